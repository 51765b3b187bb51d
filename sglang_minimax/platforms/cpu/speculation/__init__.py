"""Eagle3 on a CPU: SGLang's own worker, with draft trees and their attention in PyTorch."""
