"""Every page of the book: quiet, local, accessible, light, readable without scripts and on a phone."""

from pathlib import Path

import axe_core_python
import pytest

AXE = Path(axe_core_python.__file__).parent / "axe.min.js"
MAX_HTML = 1_500_000


def test_a_page_reports_no_error_and_asks_nothing_outside(seen):
    seen.page.wait_for_load_state("load")
    assert seen.errors == []
    assert seen.outside == []


@pytest.mark.pages_with("$")
def test_formulas_are_drawn_from_local_files(seen):
    page = seen.page
    page.wait_for_function(
        "() => document.querySelector('mjx-container') && window.MathJax.startup.promise"
    )
    assert page.locator(".math:not(:has(mjx-container))").count() == 0
    assert page.locator("mjx-merror").count() == 0
    fonts = page.evaluate(
        "document.fonts.ready.then((all) => [...all].filter((f) => /MJX/.test(f.family) && f.status === 'loaded').length)"
    )
    assert fonts > 0


def light_and_dark(page):
    """The page in both colour schemes, one after the other."""
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function("(s) => document.documentElement.dataset.theme === s", arg=scheme)
        page.evaluate(
            "document.getAnimations().forEach((one) => one.finish())"
        )  # colours that fade
        yield scheme


def serious_violations(page, **options):
    """What axe finds, but for the inside of drawings: each is one image with a text of its own, and has thousands of nodes."""
    page.evaluate(AXE.read_text("utf8"))
    what = "{ include: [document], exclude: ['.moe-plot svg'] }"
    run = f"(options) => axe.run({what}, {{ resultTypes: ['violations'], ...options }})"
    return [
        f"{v['id']}: {node['target']} {node['failureSummary']}"
        for v in page.evaluate(run, options)["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


def test_no_serious_accessibility_violation(seen):
    opened = "(open) => document.querySelectorAll('.moe-explorer details').forEach((e) => (e.open = open))"
    seen.page.evaluate(opened, True)
    assert serious_violations(seen.page) == []
    seen.page.evaluate(opened, False)


@pytest.mark.first_page_with("Step(")  # between pages colours do not differ
def test_words_contrast_with_a_dark_page_too(seen):
    for scheme in light_and_dark(seen.page):
        if scheme == "dark":
            assert serious_violations(seen.page, runOnly=["color-contrast"]) == []


# axe does not look into drawings
CONTRAST = """() => {
  const parse = (color) => { const [r, g, b, a = 1] = color.match(/[\\d.]+/g).map(Number); return { rgb: [r, g, b], a }; };
  const ground = (node) => { for (; node; node = node.parentElement) { const c = parse(getComputedStyle(node).backgroundColor); if (c.a > 0) return c.rgb; } return [255, 255, 255]; };
  const light = (rgb) => rgb.map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4).reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const rows = [];
  for (const text of document.querySelectorAll(".moe-plot .xtick text, .moe-plot .ytick text, .moe-plot .xtitle, .moe-plot .ytitle, .moe-explorer figcaption, .moe-said")) {
    if (!text.textContent.trim()) continue;
    const style = getComputedStyle(text), { rgb, a } = parse(text.closest("svg") ? style.fill : style.color), back = ground(text);
    const [hi, lo] = [light(rgb.map((v, i) => v * a + back[i] * (1 - a))), light(back)].sort((x, y) => y - x);
    rows.push([(hi + 0.05) / (lo + 0.05), text.textContent]);
  }
  return rows;
}"""


def test_words_in_figures_contrast_with_the_page(seen):
    for scheme in light_and_dark(seen.page):
        faint = [text for ratio, text in seen.page.evaluate(CONTRAST) if ratio < 4.5]
        assert faint == [], scheme


def test_a_page_can_be_read_without_scripts(visit):
    page = visit(java_script_enabled=False).page
    assert page.locator("article h1").is_visible()
    assert len(page.locator("article").inner_text().split()) > 5
    for figure in page.locator(".moe-explorer").all():
        assert figure.locator("figcaption").inner_text().strip()
        assert "This figure moves" in figure.locator(".moe-still").inner_text()


def test_a_page_is_light(site, page_name):
    assert (site / f"{page_name}.html").stat().st_size <= MAX_HTML


def test_a_page_fits_a_phone(visit):
    seen = visit(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    seen.explorers()
    wide = seen.page.evaluate("""() => document.documentElement.scrollWidth <= innerWidth ? [] :
        [...document.querySelectorAll("article *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).slice(0, 5).map((e) => e.outerHTML.slice(0, 120))""")
    assert wide == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 360
    for control in seen.page.locator(".moe-control :is(input, select, button)").all():
        box = control.bounding_box()
        assert min(box["width"], box["height"]) >= 24, control.evaluate("(e) => e.outerHTML")
