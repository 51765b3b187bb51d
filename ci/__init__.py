"""Tools that make, check and measure what the package ships; not part of the package."""
