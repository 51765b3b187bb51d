"""A run as JUnit XML, which CI systems show: a test case for each figure, and for each suite."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as ET

from ci.lane.outcome import Judged, Outcome, SuiteOutcome, VariantOutcome
from ci.lane.plain import plain


def write(outcome: Outcome, path: Path) -> None:
    """Write the file, in whole or not at all."""
    tree = ET.ElementTree(document(outcome))
    ET.indent(tree)
    beside = path.with_name(f".{path.name}.part")
    tree.write(beside, encoding="utf-8", xml_declaration=True)
    beside.replace(path)


def document(outcome: Outcome) -> ET.Element:
    """The `testsuites` element: a test suite for each variant, or one for what is missing."""
    root = ET.Element("testsuites", name=outcome.lane)
    if outcome.missing:
        suite = ET.SubElement(root, "testsuite", name=outcome.lane)
        for sentence in outcome.missing:
            ET.SubElement(_case(suite, outcome.lane, "requirements"), "error", message=sentence)
    for variant in outcome.variants:
        _variant(root, outcome.lane, variant)
    if not outcome.ended:
        suite = ET.SubElement(root, "testsuite", name=outcome.lane)
        ET.SubElement(_case(suite, outcome.lane, "run"), "error", message="it has not ended.")
    for suite in root:
        for kind, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            suite.set(kind, str(len(suite.findall(f"testcase/{tag}"))))
        suite.set("tests", str(len(suite.findall("testcase"))))
    for each in root.iter():
        each.text = plain(each.text) if each.text else None
        for name, value in each.attrib.items():
            each.set(name, plain(value))
    return root


def _variant(root: ET.Element, lane: str, variant: VariantOutcome) -> None:
    suite = ET.SubElement(root, "testsuite", name=f"{lane}.{variant.name}")
    start = _case(suite, suite.get("name", ""), "server")
    if variant.error is not None:
        ET.SubElement(start, "error", message=variant.error)
    for each in variant.suites:
        _suite(suite, each)


def _suite(parent: ET.Element, suite: SuiteOutcome) -> None:
    where = f"{parent.get('name')}.{suite.name}"
    case = _case(parent, where, "ran", suite.seconds)
    if suite.error is not None:
        ET.SubElement(case, "error", message=suite.error)
    for figure in suite.figures:
        _figure(_case(parent, where, figure.name), figure)


def _figure(case: ET.Element, figure: Judged) -> None:
    ET.SubElement(case, "system-out").text = f"{figure.value} {figure.note}".strip()
    if figure.verdict == "missed":
        said = f"{figure.value:.4g} against a threshold of {figure.threshold:.4g}"
        ET.SubElement(case, "failure", message=said)
    elif figure.verdict == "absent":
        ET.SubElement(case, "failure", message="the suite gave no such number")


def _case(suite: ET.Element, where: str, name: str, seconds: float = 0.0) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=where, name=name, time=f"{seconds:.3f}")
