"""The documents: links that lead somewhere, terms of the field, the toy of docs/toy.md."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("docs/**/*.md"))]
spec = importlib.util.spec_from_file_location("toy", ROOT / "docs" / "toy.py")
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            assert target.exists(), link
            if target.suffix == ".md" and anchor:
                assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_an_arxiv_number_is_a_link(page):
    """Beside the tables and listings, which are made from CSVs and code."""
    text = re.sub(r"```.*?```|^\|.*?$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert not re.findall(r"(?<!\[)arXiv:\d", text)


# ------------------------------------------------------------------ docs/toy.py
@pytest.fixture(scope="module")
def found():
    return toy.run()


def test_twenty_steps_keep_both_modes(found):
    """After one update the share of each hill is that of pi_old exp(Q / lambda)."""
    a = torch.linspace(-1.5, 1.5, 601)
    left = (toy.exact(1, a) * (a < 0)).sum() * (a[1] - a[0])
    many, _ = found[1]
    assert abs((many < 0).float().mean() - left) < 0.1 and 0.25 < left < 0.4
    for hill in -0.6, 0.6:
        assert ((many - hill).abs() < 0.3).float().mean() > 0.2


def test_one_step_lands_on_the_mean(found):
    """Whatever the noise: between the hills, where Q is low."""
    many, one = found[1]
    assert abs(one.mean() - many.mean()) < 0.15 and one.std() < 0.3 * many.std()
    assert toy.q(one).mean() < 0.5 < toy.q(many).mean()


def test_one_step_is_enough_in_the_end(found):
    many, one = found[6]
    assert toy.q(one).mean() > 0.9 and (one - many).square().mean().sqrt() < 0.15


def test_the_picture_is_drawn(found, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need matplotlib")
    toy.draw(found, tmp_path / "toy.png")
    assert (tmp_path / "toy.png").stat().st_size > 10_000
