"""Sentences from numbers made by hand: good signs and bad ones."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pcenet.explanation.findings import layer_findings, owners, summary


def health(load: list[float], max_min: float | None, drop_rate: float = 0.0) -> dict[str, Any]:
    dead = [expert for expert, share in enumerate(load) if share == 0]
    return {"load": load, "entropy": 0.5, "max_min": max_min, "drop_rate": drop_rate} | {
        "dead": len(dead),
        "dead_experts": dead,
    }


def layer(**changes: Any) -> dict[str, Any]:
    """Two experts, two classes of 100 patches: expert 0 serves 90 of the sky and 30 of the road."""
    return {
        "name": "a.body",
        "title": "a",
        "experts": 2,
        "health": health([0.6, 0.4], 1.5),
        "sharpness": {"gate": 0.9, "margin": 0.8, "entropy": 0.4},
        "specialisation": {
            "patches": 200,
            "with_class": 0.30,
            "control_class": 0.01,
            "with_position": 0.20,
            "control_position": 0.01,
            "with_class_given_position": 0.25,
            "control_class_given_position": 0.05,
        },
        "by_class": {"sky": [90, 10], "road": [30, 70]},
    } | changes


def row(name: str, difference: float, half: float, layer: str | None = None, expert: int | None = None) -> Any:
    ends = {"low": difference - half, "high": difference + half}
    by_class = {"sky": difference, "road": 2 * difference, "tree": None}
    return {"name": name, "layer": layer, "expert": expert, "score": 0.5 + difference, "by_class": by_class} | {
        "difference": difference,
        **ends,
    }


def report(
    layers: list[dict[str, Any]], rows: list[Any] | None = None, twin: Any = None, images: int = 500
) -> dict[str, Any]:
    interventions = None if rows is None else {"images": images, "score": 0.5, "rows": rows}
    score = {"name": "mIoU", "value": 0.5}
    found = {"task": "segment", "images": images, "layers": layers, "interventions": interventions, "score": score}
    return found | {"twin": twin}


def texts(findings: Any) -> dict[str, list[str]]:
    return {sign: [each.text for each in findings if each.sign == sign] for sign in ("good", "bad", "note")}


def test_owners_by_hand() -> None:
    # Expert 0 has 120 of 200 patches, and 0.9 of the sky is 1.5 times its load; expert 1 has 80, and 0.7 of the road is
    # 1.75 times.
    found = owners(layer())
    assert [(each.name, each.expert, each.share, each.load, each.patches) for each in found] == [
        ("road", 1, 0.7, 0.4, 100),
        ("sky", 0, 0.9, 0.6, 100),
    ]
    assert owners(layer(by_class={"sky": [29, 0], "road": [0, 1000]})) == []  # too few, and no more than all
    assert owners(layer(by_class={"sky": [49, 51], "road": [49, 51]})) == []


def test_a_layer_that_specialises() -> None:
    found = texts(layer_findings(layer(), "segment"))
    assert (found["bad"], found["note"]) == ([], [])
    (text,) = found["good"]
    assert 'expert 1 serves 70.0 % of "road" and 40.0 % of all; expert 0 serves 90.0 % of "sky" and 60.0 %' in text


def test_a_layer_that_does_not() -> None:
    numbers = layer()["specialisation"] | {"with_class": 0.02, "with_class_given_position": 0.06}
    even = {"sky": [60, 40], "road": [60, 40]}
    found = texts(layer_findings(layer(specialisation=numbers, by_class=even), "segment"))
    assert found == {
        "good": [],
        "note": [],
        "bad": ["Experts do not differ by class: each class is spread over them as all patches are."],
    }
    by_place = numbers | {"with_position": 0.8}
    found = texts(layer_findings(layer(specialisation=by_place, by_class=even), "segment"))
    assert "from the place alone: mutual information 0.80 (by chance 0.01); among patches of one" in found["bad"][1]
    assert "the expert tells nothing" in found["bad"][1]
    found = texts(layer_findings(layer(specialisation=None, by_class={}), "segment"))
    assert found["note"] == ["No patch has a class here, so nothing is known of experts and classes."]


def test_classes_spread_unevenly_without_an_owner() -> None:
    uneven = {"sky": [50, 50], "road": [55, 45]}
    (text,) = texts(layer_findings(layer(by_class=uneven), "segment"))["note"]
    assert text.startswith("No expert owns a class")
    numbers = layer()["specialisation"] | {"with_class": 0.02}
    (text,) = texts(layer_findings(layer(by_class=uneven, specialisation=numbers), "segment"))["note"]
    assert "among patches of one place they do" in text


def test_signs_of_an_ill_router() -> None:
    ill = health([1.0, 0.0], None, drop_rate=0.02)
    blind = {"gate": 0.55, "margin": 0.1, "entropy": 0.99}
    bad = texts(layer_findings(layer(health=ill, sharpness=blind), "segment"))["bad"]
    assert bad[0] == "Dead: no patch goes to expert 1."
    assert bad[1] == "2.0 % of the patches are dropped for lack of capacity."
    assert "mean gate value is 0.55, and 0.50 is that of one that cannot tell" in bad[2]
    uneven = health([7 / 9, 2 / 9], 3.5)
    assert texts(layer_findings(layer(health=uneven), "segment"))["bad"] == [
        "Uneven: the busiest expert has 3.5 times the load of the idlest."
    ]
    assert texts(summary(report([layer(health=uneven)])))["bad"] == [
        "a: Uneven: the busiest expert has 3.5 times the load of the idlest."
    ]


def test_interventions_that_do_harm() -> None:
    rows = [
        row("random expert", -0.2, 0.1),
        row("one expert for all", -0.3, 0.1, expert=0),
        row("one expert for all", -0.2, 0.1, expert=1),
        row("knocked out", -0.01, 0.005, "a.body", 0),
        row("knocked out", -0.05, 0.02, "a.body", 1),
        row("random expert", -0.4, 0.1, "a.body"),
    ]
    found = texts(summary(report([layer()], rows)))
    assert found["bad"] == []
    random, single, missed, *_ = found["good"]
    assert "mIoU goes from 50.0 % to 30.0 % (95 % interval -30.0 to -10.0 points, 500 images)" in random
    assert "the best is expert 1" in single
    assert "missed most is 1 of a" in missed
    assert (
        '-5.0 points (95 % interval -7.0 to -3.0), that of class "road" by -10.0. Shown to be needed: 2 of 2 experts.'
        in missed
    )


def test_interventions_that_do_none() -> None:
    rows = [
        row("random expert", -0.01, 0.02),
        row("one expert for all", 0.01, 0.02, expert=0),
        row("knocked out", -0.01, 0.02, "a.body", 0),
    ]
    bad = texts(summary(report([layer()], rows)))["bad"]
    assert bad[0].startswith("Nothing shows that it matters which expert serves a patch")
    assert bad[1].startswith("It is not shown that more than one expert is needed; see expert 0")
    assert bad[2].startswith("No single expert is shown to be needed: of 1 that were knocked out")
    assert "without expert 0 of a: mIoU changes by -1.0 points (95 % interval -3.0 to +1.0)." in bad[2]


# The rows of each table, and the beginning of what is said of it, with its sign. Differences and half intervals.
RANDOM, SECOND, ALL_0, ALL_1 = "random expert", "second choice", ("one expert for all", 0), ("one expert for all", 1)
WITHOUT_0, WITHOUT_1, RANDOM_HERE = ("knocked out", 0), ("knocked out", 1), ("random expert", None)
MATTERS, PARTLY = "Which expert serves a patch matters: ", "It is not shown that a random expert is worse than"
NOTHING = "Nothing shows that it matters which expert serves a patch: "


def table(rows: dict[Any, tuple[float, float]]) -> list[Any]:
    found = []
    for key, (difference, half) in rows.items():
        name, expert = key if isinstance(key, tuple) else (key, None)
        where = "a.body" if name == "knocked out" or key == RANDOM_HERE else None
        found.append(row(name, difference, half, where, expert))
    return found


@pytest.mark.parametrize(
    ("rows", "sign", "words"),
    [
        ({RANDOM: (-0.2, 0.1), SECOND: (0.0, 0.1)}, "good", MATTERS),
        ({RANDOM: (-0.006, 0.02), SECOND: (-0.089, 0.04)}, "note", PARTLY),  # as a user met it
        ({RANDOM: (-0.006, 0.02), ALL_0: (0.0, 0.02), ALL_1: (-0.2, 0.1)}, "note", PARTLY),
        ({RANDOM: (0.03, 0.01), WITHOUT_1: (-0.2, 0.1)}, "note", PARTLY),
        ({RANDOM: (-0.006, 0.02), RANDOM_HERE: (-0.2, 0.1)}, "note", PARTLY),
        ({RANDOM: (-0.006, 0.02), SECOND: (-0.02, 0.02), ALL_0: (0.1, 0.02)}, "bad", NOTHING),
        # What a router makes of positions changes gate values too: it is no proof of who serves what.
        ({RANDOM: (-0.006, 0.02), "positions shuffled": (-0.2, 0.1)}, "bad", NOTHING),
    ],
)
def test_whether_it_matters_is_said_by_all_rows(rows: dict[Any, Any], sign: str, words: str) -> None:
    first = summary(report([layer()], table(rows)))[0]
    assert (first.sign, first.text[: len(words)]) == (sign, words)


def test_the_row_that_contradicts_is_named() -> None:
    rows = table({RANDOM: (-0.006, 0.02), SECOND: (-0.089, 0.04), WITHOUT_1: (-0.02, 0.01), ALL_0: (0.0, 0.1)})
    text = summary(report([layer()], rows))[0].text
    assert "the intervals of 2 of 4 changes lie below 0" in text
    assert "the largest loss with second choice, in all layers: -8.9 points (95 % interval -12.9 to -4.9)." in text


@pytest.mark.parametrize(
    ("rows", "sign", "words"),
    [
        (
            {ALL_0: (-0.1, 0.05), ALL_1: (-0.2, 0.05)},
            "good",
            "No single expert does as well as the router's",
        ),
        # Expert 0 is ahead of expert 1, and its interval alone lies below 0.
        (
            {ALL_0: (-0.01, 0.005), ALL_1: (-0.02, 0.03)},
            "bad",
            "It is not shown that more than one expert is needed",
        ),
        (
            {ALL_0: (-0.1, 0.05), ALL_1: (0.1, 0.05)},
            "bad",
            "A single expert does better than the router's",
        ),
    ],
)
def test_one_expert_for_all_by_all_rows(rows: dict[Any, Any], sign: str, words: str) -> None:
    found = [each for each in summary(report([layer()], table(rows))) if words in each.text]
    assert [each.sign for each in found] == [sign]
    assert f"expert {0 if sign == 'good' else 1}, if it serves" in found[0].text


@pytest.mark.parametrize(
    ("rows", "dead", "words"),
    [
        # A tie at zero is not missed most.
        ({WITHOUT_0: (0.0, 0.0), WITHOUT_1: (0.0, 0.0)}, [], ["No single expert is missed: whichever of 2 is knocked"]),
        ({WITHOUT_0: (0.0, 0.01), WITHOUT_1: (0.01, 0.02)}, [], ["No single expert is missed: whichever of 2 is"]),
        # What a dead expert would be missed for is nothing to be said of the others.
        ({WITHOUT_0: (0.01, 0.02), WITHOUT_1: (0.0, 0.0)}, [1], ["No single expert is missed: whichever of 1 is"]),
        ({WITHOUT_0: (0.0, 0.0), WITHOUT_1: (0.0, 0.0)}, [0, 1], []),
        # The largest loss is not shown, a smaller one is.
        (
            {WITHOUT_0: (-0.05, 0.06), WITHOUT_1: (-0.03, 0.01)},
            [],
            ["The expert that is missed most is 1 of a: without it"],
        ),
        # And one that does harm.
        (
            {WITHOUT_0: (-0.05, 0.01), WITHOUT_1: (0.03, 0.01)},
            [],
            [
                "The expert that is missed most is 0 of a",
                "Expert 1 of a does harm: without it mIoU changes by +3.0",
            ],
        ),
    ],
)
def test_who_is_missed_by_all_rows(rows: dict[Any, Any], dead: list[int], words: list[str]) -> None:
    load = [0.0 if expert in dead else 0.5 for expert in range(2)]
    ill = layer(health=health(load, None if dead else 1.0))
    found = [each.text for each in summary(report([ill], table(rows)))]
    about = [text for text in found if "missed" in text or "does harm" in text or "to be needed" in text]
    assert [text[: len(start)] for text, start in zip(about, words, strict=True)] == words


def test_a_class_without_a_loss_is_not_named_as_losing_most() -> None:
    gained = row("knocked out", -0.05, 0.01, "a.body", 0) | {"by_class": {"sky": None, "road": 0.02}}
    (text,) = [each.text for each in summary(report([layer()], [gained])) if "missed most" in each.text]
    assert "class" not in text
    nothing = gained | {"by_class": {"sky": None}}
    assert summary(report([layer()], [nothing]))


def test_dead_experts_are_said_first() -> None:
    layers = [
        layer(),
        layer(name="b.body", title="b", health=health([1.0, 0.0], None)),
        layer(name="c", title="c", experts=3, health=health([0.0, 1.0, 0.0], None)),
    ]
    found = summary(report(layers, table({RANDOM: (-0.2, 0.1)})))
    text = "Dead: 3 of 7 experts get no patch at all: expert 1 of b; experts 0, 2 of c."
    assert (found[0].sign, found[0].text) == ("bad", text)
    assert len([each for each in found if "Dead" in each.text]) == 1
    first = layer_findings(layers[2], "segment")[0]
    assert (first.sign, first.text) == ("bad", "Dead: no patch goes to expert 0 or 2.")


def test_digits_are_those_that_the_images_support() -> None:
    rows = table({RANDOM: (-0.083, 0.1), ALL_0: (-0.25, 0.1)})
    twin = {"value": 0.417, "ahead": 0.083, "low": -0.25, "high": 0.333}
    found = " ".join(each.text for each in summary(report([layer()], rows, twin, images=12)))
    assert "mIoU goes from 50 % to 42 % (95 % interval -18 to +2 points, 12 images)" in found
    assert "its dense twin's 42 %: +8 points (95 % interval -25 to +33, over 12 images;" in found
    assert not re.search(r"mIoU is \d+\.\d", found)


def test_place_counts_beyond_chance_alone() -> None:
    """With few patches at each place chance alone makes much of the place."""
    numbers = layer()["specialisation"] | {"with_position": 0.7, "control_position": 0.4}
    assert not [each for each in summary(report([layer(specialisation=numbers)])) if "where a patch lies" in each.text]
    assert not [each for each in layer_findings(layer(specialisation=numbers), "segment") if "place alone" in each.text]


def test_classes_at_one_place_are_not_passed_over() -> None:
    at_a_place = layer()["specialisation"] | {"with_class": 0.02}
    neither = at_a_place | {"with_class_given_position": 0.05}
    layers = [layer(specialisation=neither), layer(title="b", specialisation=at_a_place)]
    found = texts(summary(report(layers)))
    assert not [text for text in found["bad"] if "tell anything of the class" in text]
    assert [text for text in found["note"] if "but in b it does among patches of one place" in text]


def test_to_classify_classes_count_among_patches_of_one_place_alone() -> None:
    """Patches of an image share its class, and may share an expert by chance."""
    by_image = layer()["specialisation"] | {"with_class": 0.3, "control_class": 0.01, "with_class_given_position": 0.05}
    layers = [layer(specialisation=by_image, by_class={"sky": [100, 100], "road": [100, 100]})]
    assert texts(summary(report(layers)))["good"]
    found = texts(summary(report(layers) | {"task": "classify"}))
    assert not found["good"]
    assert "In no layer does the expert tell anything of the class: no expert specialises in classes." in found["bad"]
    assert "Experts do not differ by class: each class is spread over them as all patches are." in [
        finding.text for finding in layer_findings(layers[0], "classify")
    ]


def test_the_layer_that_tells_most_of_the_class_is_so_beyond_chance() -> None:
    """Where patches are few chance alone gives large numbers."""
    noisy = layer()["specialisation"] | {"with_class": 0.5, "control_class": 0.45}
    found = summary(report([layer(title="noisy", specialisation=noisy), layer(title="clear")]))
    assert [each for each in found if "In 2 of 2 layers" in each.text and "most of all in clear" in each.text]


def test_behind_the_twin_is_a_bad_sign_and_ahead_of_it_no_proof() -> None:
    for low, high, sign in ((0.01, 0.05, "note"), (-0.05, -0.01, "bad"), (-0.01, 0.05, "note")):
        twin = {"value": 0.4, "ahead": (low + high) / 2, "low": low, "high": high}
        found = texts(summary(report([layer()], twin=twin)))[sign]
        assert any("its dense twin's 40.0 %" in text for text in found)


def test_classes_that_are_owned_by_place_alone() -> None:
    numbers = layer()["specialisation"] | {"with_class_given_position": 0.05}
    (text,) = texts(layer_findings(layer(specialisation=numbers), "segment"))["note"]
    assert text.endswith("It may owe them to where they lie.")
    assert not any("clearest case" in each.text for each in summary(report([layer(specialisation=numbers)])))
    assert any("clearest case" in each.text for each in summary(report([layer()])))


def test_without_any_specialisation() -> None:
    numbers = layer()["specialisation"] | {"with_class": 0.02, "with_position": 0.7, "with_class_given_position": 0.05}
    found = texts(summary(report([layer(specialisation=numbers, by_class={"sky": [60, 40]})])))
    assert found["good"] == []
    assert found["bad"] == ["In no layer does the expert tell anything of the class: no expert specialises in classes."]
    assert found["note"] == ["In a much of the routing follows from where a patch lies, whatever is in it."]
