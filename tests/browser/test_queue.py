"""The playground's queue: further prompts wait while one runs, and the prints can be used meanwhile."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import expect

from tests.browser.conftest import PATIENCE_MS, Visit
from tests.server.hosting import GENERATE


def num_sent(visit: Visit) -> int:
    return sum(url.endswith(GENERATE) for url in visit.requests)


def prompts(visit: Visit, num: int) -> list[str]:
    """The prompts of the prints, newest first, once there are so many."""
    shown = visit.page.locator("#prints .show em")
    expect(shown).to_have_count(num, timeout=PATIENCE_MS)
    return shown.all_inner_texts()


def test_prompts_wait_their_turn_and_all_are_made(visit: Visit) -> None:
    seen = visit.page.evaluate(
        """() => {
            const [prompt, form] = ["prompt", "form"].map((id) => document.getElementById(id));
            for (const text of ["an owl", "a cat", "a dog", "a hen"]) {
                prompt.value = text;
                form.requestSubmit();
            }
            const texts = (name) => [...document.querySelectorAll(name)].map((each) => each.textContent);
            return [texts("#make-text"), texts("#caption"), texts("#waiting-list em")];
        }"""
    )
    assert seen == [["Add to the queue"], ["an owl"], ["a cat", "a dog", "a hen"]]
    assert sorted(prompts(visit, 4)) == ["a cat", "a dog", "a hen", "an owl"]
    visit.gone("#running")
    visit.done()
    assert visit.text("#caption") == "a hen", "the sheet went along"
    assert visit.text("#make-text") == "Make picture"


def test_prints_are_looked_at_while_another_is_made(visit: Visit) -> None:
    visit.make("an owl")
    visit.ask("a cat", endpoint="still", steps=50)
    visit.hear("step")
    visit.page.click("#prints .show")
    assert visit.text("#caption") == "an owl"
    assert visit.page.locator("#actions").is_visible()
    assert visit.page.locator("#running").is_visible()
    visit.page.click("#use")
    visit.page.click("#watch")
    assert visit.text("#caption") == "a cat"
    visit.page.click("#cancel")
    visit.gone("#running")
    assert visit.text("#caption") == "an owl", "what lay there before"


def test_what_waits_can_be_taken_back(visit: Visit) -> None:
    for prompt in ("an owl", "a cat", "a dog", "a hen"):
        visit.ask(prompt, endpoint="still", steps=50)
    visit.hear("waits here", selector="#waiting-list li:last-child small")
    visit.page.click("#waiting-list li:last-child button:last-child")
    assert visit.page.locator("#waiting-list em").all_inner_texts() == ["a cat", "a dog"]
    assert num_sent(visit) == 3, "the server never heard of it"
    visit.page.click("#cancel-all")
    visit.gone("#running")
    assert visit.page.locator("#welcome").is_visible()
    assert not visit.page.locator("#error").is_visible()


def test_the_queue_outlives_a_reload(visit: Visit) -> None:
    for prompt in ("an owl", "a cat", "a dog", "a hen"):
        visit.ask(prompt, endpoint="slow", steps=20)
    visit.hear("step")
    visit.page.reload()
    assert sorted(prompts(visit, 4)) == ["a cat", "a dog", "a hen", "an owl"]
    visit.gone("#running")


def test_a_failure_does_not_hold_up_the_others(visit: Visit, tmp_path: Path) -> None:
    both_asked = tmp_path / "both-asked"
    failing = f"an owl !wait@3:{both_asked} !fail@9"
    visit.ask(failing, endpoint="slow", steps=20)
    visit.ask("a cat", endpoint="slow", steps=40)
    both_asked.touch()
    visit.see("#error")
    assert f"“{failing}”: the fake job failed at step 9" in visit.text("#error")
    assert visit.text("#caption") == "a cat"
    assert prompts(visit, 1) == ["a cat"]


def test_steps_are_counted_for_each_picture(visit: Visit) -> None:
    visit.ask("an owl", endpoint="still", steps=50, count=3)
    visit.hear("picture 1 of 3, step")
    visit.page.click("#cancel")
    visit.gone("#running")
