"""The findings in plain sentences."""

from __future__ import annotations

import math

import pytest
from tiny_comparisons import Made, found, outcomes, tables

from ift_tune.compare.arms import ARMS
from ift_tune.compare.findings import Findings, find
from ift_tune.compare.verdict import capitalise, display_name, judge

LOW = [0.10, 0.11, 0.12, 0.10, 0.13, 0.11, 0.12, 0.11]
HIGH = [0.20, 0.22, 0.25, 0.21, 0.26, 0.23, 0.22, 0.23]
AHEAD = "IFT is ahead here, of searches that leave the validation examples alone."
MIXED = [0.05, 0.17, 0.08, 0.15, 0.10, 0.14, 0.09, 0.13]
NAN = math.nan


def limits(findings: Findings) -> list[str]:
    """Return the notes of the verdict, but for the one on the validation examples."""
    return [note for note in judge(findings).notes if not note.startswith("IFT learns from")]


def test_better() -> None:
    findings = found(outcomes({"ift": LOW, "random": HIGH}))
    (against,) = findings.against
    assert against.conclusion == 1
    verdict = judge(findings)
    assert verdict.headline.startswith(
        f"{AHEAD} IFT is better than random search: "
        "test error after retraining 0.1125 against 0.2275 ("
    )
    assert "difference -0.115, 95 % interval -0.12" in verdict.headline
    assert "lower in 8 of 8 seeds; p = 0.0078 with Holm's correction" in verdict.headline
    assert verdict.others == []
    assert limits(findings) == []


def test_worse() -> None:
    findings = found(outcomes({"ift": HIGH, "random": LOW}))
    assert findings.against[0].conclusion == -1
    verdict = judge(findings)
    assert verdict.headline.startswith(
        "IFT is not worth it here. Random search is better than IFT: "
        "test error after retraining 0.2275 against 0.1125 (difference 0.115"
    )
    assert "lower in 0 of 8 seeds" in verdict.headline


def test_no_evidence() -> None:
    findings = found(outcomes({"ift": MIXED, "random": LOW}))
    assert findings.against[0].conclusion == 0
    verdict = judge(findings)
    assert verdict.headline.startswith(
        "Whether IFT is worth it here is not shown. "
        "No evidence that IFT and random search differ: test error"
    )
    assert limits(findings) == []


def test_equal_in_all_seeds() -> None:
    findings = found(outcomes({"ift": LOW, "random": LOW}))
    assert findings.against[0].conclusion == 0
    assert "p = 1 " in judge(findings).headline


def test_five_seeds_cannot_show_anything_and_the_verdict_says_how_many_can() -> None:
    findings = found(outcomes({"ift": LOW[:5], "random": HIGH[:5]}))
    assert findings.against[0].conclusion == 0
    verdict = judge(findings)
    assert verdict.headline.startswith("Whether IFT is worth it here is not shown.")
    (note,) = limits(findings)
    assert "with 5 pairs the test cannot go below p = 0.0625" in note
    assert "1 comparison at the level 0.05 take at least 6 seeds" in note
    six = found(outcomes({"ift": LOW[:6], "random": HIGH[:6]}))
    assert six.against[0].conclusion == 1
    assert limits(six) == []


def test_more_comparisons_take_more_seeds() -> None:
    findings = found(outcomes({"ift": LOW[:6], "random": HIGH[:6], "tpe": HIGH[:6]}))
    assert [a.conclusion for a in findings.against] == [0, 0]
    (note,) = limits(findings)
    assert "2 comparisons at the level 0.05 take at least 7 seeds" in note
    seven = found(outcomes({"ift": LOW[:7], "random": HIGH[:7], "tpe": HIGH[:7]}))
    assert [a.conclusion for a in seven.against] == [1, 1]


def test_the_headline_is_about_random_search() -> None:
    values = {"ift": LOW, "tpe": [v - 0.01 for v in HIGH], "random": HIGH, "none": HIGH}
    verdict = judge(found(outcomes(values)))
    start = f"{AHEAD} IFT is better than random search"
    assert verdict.headline.startswith(start)
    assert len(verdict.others) == 2
    assert any("IFT is better than no search" in text for text in verdict.others)
    assert not any("worth it" in text for text in verdict.others)


def test_to_be_worth_it_ift_must_beat_every_arm_without_it() -> None:
    values = {"ift": LOW, "random+val": MIXED, "random": HIGH, "none": HIGH}
    verdict = judge(found(outcomes(values)))
    assert verdict.headline.startswith(
        "Whether IFT is worth it here is not shown. No evidence that IFT and random search that "
        "trains on the validation examples too differ"
    )
    assert verdict.others[0].startswith("IFT is better than random search: ")


def test_where_no_arm_trains_on_the_validation_examples_ift_is_only_ahead() -> None:
    verdict = judge(found(outcomes({"ift": LOW, "random": HIGH})))
    assert verdict.headline.startswith("IFT is ahead here, of searches that leave the validation")
    assert any("--arms val,random+val adds" in note for note in verdict.notes)
    values = {"ift": LOW, "random": HIGH, "random+val": HIGH, "val": HIGH}
    verdict = judge(found(outcomes(values)))
    assert verdict.headline.startswith("IFT is worth it here. IFT is better than random search: ")
    assert verdict.notes == []


@pytest.mark.parametrize("lacking", ["val", "random+val"])
def test_a_rival_that_is_lacking_is_named(lacking: str) -> None:
    values = {"ift": LOW, "random": HIGH, "random+val": HIGH, "val": HIGH}
    verdict = judge(found(outcomes({k: v for k, v in values.items() if k != lacking})))
    assert verdict.headline.startswith("IFT is ahead here, of the rivals that were run. IFT is")
    (note,) = verdict.notes
    assert f"Whether it is worth it, {lacking} (random search that trains on" in note
    assert note.endswith(f"--arms {lacking} adds what is missing.")


def test_a_rival_that_has_found_nothing_is_not_asked_for_again() -> None:
    made = tables(outcomes({"ift": LOW, "random": HIGH, "random+val": HIGH}))
    made.trials.attrs["run"]["extent"]["arms"].append("val")
    notes = judge(find(made)).notes
    assert not any("--arms val adds" in note for note in notes)


@pytest.mark.parametrize("words", ["example weights: min 0", "x: mean 1; example weights: min 0"])
def test_where_examples_are_weighed_loss_ranking_is_asked_for(words: str) -> None:
    values = {"ift": LOW, "val": HIGH, "random+val": HIGH}
    made = tables(outcomes(values))
    made.trials["learned_words"] = words
    verdict = judge(find(made))
    assert verdict.headline.startswith("IFT is ahead here, of the rivals that were run.")
    assert any("--arms loss-ranking adds" in note for note in verdict.notes)
    made = tables(outcomes(values | {"loss-ranking": HIGH}))
    made.trials["learned_words"] = words
    assert judge(find(made)).headline.startswith("IFT is worth it here. ")


def test_where_sources_are_mixed_the_usual_mixtures_are_asked_for() -> None:
    rivals = {"val": HIGH, "random+val": HIGH}
    words = "domain weights: code 0.6 (2 times its share), web 0.4"
    for more, lacking in (({}, "proportional,uniform"), ({"uniform": HIGH}, "proportional")):
        made = tables(outcomes({"ift": LOW, **rivals, **more}))
        made.trials["learned_words"] = words
        verdict = judge(find(made))
        assert verdict.headline.startswith("IFT is ahead here, of the rivals that were run.")
        assert any(f"--arms {lacking} adds" in note for note in verdict.notes)
    made = tables(outcomes({"ift": LOW, **rivals, "uniform": HIGH, "proportional": HIGH}))
    made.trials["learned_words"] = words
    assert judge(find(made)).headline.startswith("IFT is worth it here. ")


def test_the_verdict_is_about_the_refitted_model_whatever_came_of_it() -> None:
    lower = [value - 0.05 for value in LOW]
    rivals = {"val": HIGH, "random+val": HIGH}
    findings = found(outcomes({"ift": lower, "ift+tpe": lower, "ift+val": LOW, **rivals}))
    assert findings.reference == "ift+val"
    verdict = judge(findings)
    assert verdict.headline.startswith("IFT is worth it here. IFT refitted on training and")
    worse = found(outcomes({"ift": LOW, "ift+val": HIGH, "val": MIXED, "random+val": MIXED}))
    assert judge(worse).headline.startswith("IFT is not worth it here. Random search that trains")


def test_ift_that_has_found_nothing_is_not_passed_over_in_silence() -> None:
    findings = found(outcomes({"random": LOW, "tpe": HIGH}), arms=["ift", "random", "tpe"])
    verdict = judge(findings)
    assert verdict.headline.startswith("IFT has found nothing that could be retrained")
    assert verdict.others[0].startswith("Random search is better than TPE")


def test_one_arm_that_is_better_is_enough_for_it_not_to_be_worth_it() -> None:
    lower, lowest = ([value - less for value in LOW] for less in (0.05, 0.07))
    values = {"ift": LOW, "tpe": lower, "gp": lowest, "random": HIGH}
    verdict = judge(found(outcomes(values)))
    start = "IFT is not worth it here. The Gaussian process is better than IFT: "
    assert verdict.headline.startswith(start)
    assert verdict.others[0].startswith("IFT is better than random search: ")
    assert verdict.others[1].startswith("TPE is better than IFT: ")


def test_an_outer_search_over_ift_does_not_decide_whether_ift_is_worth_it() -> None:
    values = {"ift": LOW, "ift+tpe": [value - 0.05 for value in LOW], "random+val": HIGH}
    values |= {"val": HIGH}
    verdict = judge(found(outcomes(values)))
    assert verdict.headline.startswith("IFT is worth it here.")
    assert verdict.others[0].startswith("IFT with an outer search by TPE is better than IFT: ")


def test_who_fails_in_some_seeds_is_not_called_better() -> None:
    low, high = [*LOW, NAN, NAN], [*HIGH, 0.2, 0.2]
    findings = found(outcomes({"ift": low, "random": high}))
    assert findings.against[0].conclusion == 0
    verdict = judge(findings)
    assert verdict.headline.startswith("Whether IFT is worth it here is not shown.")
    assert any("IFT found nothing that could be retrained in 2 of" in n for n in verdict.notes)
    other = found(outcomes({"ift": high, "random": low}))
    assert other.against[0].conclusion == 0
    assert any("Random search found nothing" in note for note in judge(other).notes)


def test_means_are_those_of_the_common_seeds() -> None:
    findings = found(outcomes({"ift": [*LOW, 0.9], "random": [*HIGH, NAN]}))
    assert findings.against[0].ours == pytest.approx(sum(LOW) / len(LOW))
    assert findings.against[0].theirs == pytest.approx(sum(HIGH) / len(HIGH))


def test_without_random_search_it_is_about_the_best_other() -> None:
    values = {"ift": LOW, "none": HIGH, "tpe": [v - 0.02 for v in HIGH]}
    verdict = judge(found(outcomes(values)))
    assert verdict.headline.startswith(f"{AHEAD} IFT is better than TPE")


def test_without_ift_nothing_is_said_about_its_worth() -> None:
    verdict = judge(found(outcomes({"tpe": LOW, "random": HIGH})))
    assert verdict.headline.startswith("TPE is better than random search")
    assert "worth it" not in verdict.headline


def test_ift_with_an_outer_search_stands_in_for_ift() -> None:
    verdict = judge(found(outcomes({"ift+tpe": LOW, "random": HIGH})))
    assert verdict.headline.startswith(f"{AHEAD} IFT with an outer search by TPE is")


def test_a_single_arm() -> None:
    verdict = judge(found(outcomes({"random": LOW})))
    assert verdict.headline == (
        "Random search alone was run: test error after retraining 0.1125; "
        "there is nothing to compare it with."
    )
    assert verdict.others == []
    assert verdict.notes == []


def test_a_single_seed_says_that_it_is_too_few() -> None:
    verdict = judge(found(outcomes({"ift": [0.1], "random": [0.3]})))
    assert "is not shown" in verdict.headline
    assert "nan" not in verdict.headline
    assert "with 1 pair the" in verdict.notes[0]


def test_arms_without_a_common_seed() -> None:
    verdict = judge(found(outcomes({"ift": [0.1, NAN], "random": [NAN, 0.3]})))
    assert verdict.headline.endswith("is not shown. IFT and random search have no seed in common.")


def test_an_unfinished_comparison_says_so() -> None:
    values = {"ift": LOW, "random": [*HIGH[:7], NAN]}
    verdict = judge(found(outcomes(values), seeds=range(8)))
    assert any("1 of 16 searches have not found anything yet" in note for note in verdict.notes)
    searches = dict(outcomes({"ift": LOW}))
    searches["random", 0] = [Made([], cost=1.0)]
    verdict = judge(found(searches, arms=["ift", "random"]))
    assert any("8 of 16" in note for note in verdict.notes)


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_has_words(name: str) -> None:
    assert display_name(name) != name or name in ("ift",)
    assert capitalise(display_name(name))[0].isupper()


def test_arms_of_others_are_called_by_their_name() -> None:
    verdict = judge(found(outcomes({"ift": LOW, "bohb": HIGH})))
    assert "IFT is better than bohb" in verdict.headline
    assert capitalise("cMA-ES") == "CMA-ES"
