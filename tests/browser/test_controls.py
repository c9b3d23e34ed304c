"""Every control of every figure, moved with the keyboard alone."""

import statistics

import pytest

DRAWN = "([plot, old]) => plot.dataset.frame !== old && plot.dataset.frame"
pytestmark = pytest.mark.pages_with("Explorer(")
SETTLED = "() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))"
RESTORE = """(e, value) => {
  if (e.type === "checkbox") { e.checked = value; } else { e.value = value; }
  for (const kind of ["input", "change"]) e.dispatchEvent(new Event(kind, { bubbles: true }));
}"""
FIRST = "(e) => { e.value = e.tagName === 'SELECT' ? e.options[0].value : 0; for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind)); }"
# Through all values of a control: how many drawings differ, and the values that drew nothing.
WALK = """async (e, plot) => {
  const drawings = new Set(), still = [];
  const values = e.type === "checkbox" ? [true, false]
    : e.tagName === "SELECT" ? [...e.options].map((o) => o.value) : Array.from({ length: +e.max + 1 }, (_, i) => i);
  for (const value of values) {
    plot.dataset.frame = "none";
    if (e.type === "checkbox") { e.checked = value; } else { e.value = value; }
    for (const kind of ["input", "change"]) e.dispatchEvent(new Event(kind, { bubbles: true }));
    for (let i = 0; i < 50 && plot.dataset.frame === "none"; i++) await new Promise(requestAnimationFrame);
    if (plot.dataset.frame === "none") still.push(value);
    drawings.add(plot.innerHTML);
  }
  return [drawings.size, still];
}"""
INKS = "() => [...document.querySelectorAll('.moe-plot .xtitle, .moe-plot .ytitle')].map((e) => getComputedStyle(e).fill)"
KEYS = {"range": "ArrowRight", "step": "ArrowRight", "select": "ArrowDown", "switch": "Space"}
# One step of a slider: from the input event to the first task after the frame that shows it.
STEP = """async (root) => {
  const range = root.querySelector("input[type=range]"), times = [];
  for (let i = 0; i < 11; i++) {
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    range.value = (+range.value + 1) % (+range.max + 1);
    const start = performance.now();
    range.dispatchEvent(new Event("input", { bubbles: true }));
    await new Promise((done) => requestAnimationFrame(() => { const { port1, port2 } = new MessageChannel(); port1.onmessage = done; port2.postMessage(0); }));
    times.push(performance.now() - start);
  }
  return times;
}"""


def kind_of(control) -> str:
    return next(kind for kind in KEYS if f"moe-{kind}" in control.get_attribute("class").split())


def press(page, plot, key: str) -> str:
    """Press a key and return the drawing that follows."""
    before = plot.get_attribute("data-frame")
    page.keyboard.press(key)
    page.wait_for_function(DRAWN, arg=[plot.element_handle(), before])
    return plot.inner_html()


@pytest.fixture
def explorers(seen):
    return seen.page, seen.explorers()


def value_of(widget):
    return widget.evaluate("(e) => e.type === 'checkbox' ? e.checked : e.value")


def put(page, widget, value) -> None:
    widget.evaluate(RESTORE, value)
    page.wait_for_function(SETTLED)


def other_end(widget):
    """A value as far as can be from the one a control has."""
    return widget.evaluate("""(e) => e.type === 'checkbox' ? !e.checked
        : e.tagName === 'SELECT' ? e.options[e.selectedIndex ? 0 : e.options.length - 1].value
        : +e.value > e.max / 2 ? '0' : e.max""")


def moves(page, plot, control) -> bool:
    """Whether a control changes the drawing, as it goes through all its values; it is back where it was.

    The first step is the keyboard's; the others, which are many, are made within the page.
    """
    kind, widget = kind_of(control), control.locator("input, select").first
    start = value_of(widget)
    if kind != "switch":
        widget.evaluate(FIRST)
    page.wait_for_function(SETTLED)
    widget.focus()
    press(page, plot, KEYS[kind])
    seen, still = widget.evaluate(WALK, plot.element_handle())
    assert still == [], f"values that drew nothing: {still}"
    put(page, widget, start)  # at the far end of one control another may have nothing to say
    return seen > 1


def test_every_control_changes_its_figure(explorers):
    page, found = explorers
    idle = []
    for explorer in found:
        plot, title = explorer.locator(".moe-drawn"), explorer.locator("figcaption").inner_text()
        controls = explorer.locator(".moe-control").all()
        for control in controls:
            alive = moves(page, plot, control)
            # A figure may start where one control has nothing to say yet, such as the first step of several.
            for other in controls:
                if alive or other is control:
                    continue
                widget = other.locator("input, select").first
                start = value_of(widget)
                put(page, widget, other_end(widget))
                alive = moves(page, plot, control)
                put(page, widget, start)
            if not alive:
                idle.append(f"{title}: {control.locator('label').inner_text()}")
    assert idle == [], "these controls change nothing in their figure, whatever they are set to"


def test_a_change_is_announced_and_the_table_follows(explorers):
    page, found = explorers
    for explorer in found:
        if explorer.locator(".moe-control").count() == 0:
            continue
        said, plot = explorer.locator("[role=status]"), explorer.locator(".moe-drawn")
        explorer.locator("summary").click()
        control = explorer.locator(".moe-control").first
        widget = control.locator("input, select").first
        before, start = said.text_content(), value_of(widget)
        widget.focus()
        key = KEYS[kind_of(control)]
        at_end = widget.evaluate(
            "(e) => e.tagName === 'SELECT' ? e.selectedIndex === e.options.length - 1 : e.type === 'range' && e.value === e.max"
        )
        press(
            page,
            plot,
            {"ArrowRight": "ArrowLeft", "ArrowDown": "ArrowUp"}.get(key, key) if at_end else key,
        )
        assert before.strip() and said.text_content().strip()
        assert explorer.locator("tbody tr").count() > 0
        put(page, widget, start)
        explorer.locator("summary").click()


@pytest.mark.first_page_with("Step(")
def test_play_and_pause_by_keyboard(visit):
    page = visit(still_clock=True).page
    buttons = page.locator(".moe-play").all()
    assert buttons
    for button in buttons:
        slider = button.locator("xpath=..").locator("input[type=range]")
        at, last = lambda s=slider: int(s.input_value()), int(slider.get_attribute("max"))
        playing = lambda b=button: b.get_attribute("data-playing")
        slider.focus()
        page.keyboard.press("Home")
        button.focus()
        page.keyboard.press("Enter")
        assert (at(), playing()) == (1, "true")  # the first step comes at once
        for _ in range(100):
            page.clock.run_for(100)
            if at() != 1:
                break
        assert at() == 2
        if last > 2:  # else it has arrived
            assert playing() == "true"
            page.keyboard.press("Enter")
        assert playing() == "false"
        page.clock.run_for(60_000)
        assert at() == 2


@pytest.mark.first_page_with("Step(")
def test_no_animation_for_those_who_asked_for_none(visit):
    seen = visit(reduced_motion="reduce")
    seen.explorers()
    for button in seen.page.locator(".moe-play").all():
        assert button.inner_text() == "Next"
        plot = button.locator("xpath=ancestor::figure").locator(".moe-drawn")
        button.focus()
        press(seen.page, plot, "Enter")
        assert button.get_attribute("data-playing") == "false"


def test_a_figure_keeps_the_height_it_had_reserved(seen):
    heights = [
        plot.evaluate("(e) => parseFloat(e.style.minHeight)")
        for plot in seen.page.locator(".moe-plot").all()
    ]
    drawn = [
        explorer.locator(".moe-plot").evaluate("(e) => e.getBoundingClientRect().height")
        for explorer in seen.explorers()
    ]
    assert drawn == pytest.approx(heights, abs=1)


def test_the_figure_follows_the_theme_button(seen):
    page = seen.page
    plot = next(
        plot
        for explorer in seen.explorers()
        if (plot := explorer.locator(".moe-plot:not([hidden])")).count()
    )
    fill = "(e) => [...e.querySelectorAll('text')].map((text) => getComputedStyle(text).fill).join()"  # some stand on a tile and stay
    light = plot.evaluate(fill)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"([e, old]) => ({fill})(e) !== old", arg=[plot.element_handle(), light])
    assert plot.evaluate(fill) != light
    page.evaluate("document.documentElement.dataset.theme = 'light'")


@pytest.mark.pages_with("text_in_color(")
def test_text_in_colour_is_text(seen):
    page = seen.page
    passages = [
        text
        for explorer in seen.explorers()
        if (text := explorer.locator(".moe-words")).is_visible()
    ]
    assert passages
    for passage in passages:
        titles = passage.locator(".moe-token").evaluate_all(
            "(tiles) => tiles.map((tile) => [tile.textContent, tile.title])"
        )
        assert all(title.startswith(f"{word}: ") for word, title in titles)
        passage.evaluate("(text) => getSelection().selectAllChildren(text)")
        assert page.evaluate("getSelection().toString()").replace("\n", "") == "".join(
            word for word, _title in titles
        )


def test_measure_a_step(seen, record_step, page_name):
    with_slider = [
        explorer for explorer in seen.explorers() if explorer.locator("input[type=range]").count()
    ]
    assert with_slider
    for explorer in with_slider:
        explorer.locator(".moe-drawn").scroll_into_view_if_needed()
        title = explorer.locator("figcaption").inner_text()
        record_step(f"{page_name}: {title}", statistics.median(explorer.evaluate(STEP)[1:]))


@pytest.mark.first_page_with("Step(")
def test_on_paper_every_figure_stands_in_dark_ink_however_far_one_has_scrolled(visit):
    page = visit(color_scheme="dark").page
    page.wait_for_function("() => window.Plotly")  # comes by itself when the page is idle
    assert page.pdf()[:4] == b"%PDF"
    assert page.locator(".moe-drawn").count() == page.locator(".moe-drawn[data-frame]").count()
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    inks = page.evaluate(INKS)
    assert inks and set(inks) <= {"rgb(31, 35, 40)"}, set(inks)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert set(page.evaluate(INKS)) != set(inks)
