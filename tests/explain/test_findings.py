"""Sentences from numbers made by hand: good signs and bad ones."""

from __future__ import annotations

from typing import Any

from pcenet.explain.findings import layer_findings, owners, summary


def layer(**changes: Any) -> dict[str, Any]:
    """Two experts, two classes of 100 patches: expert 0 serves 90 of the sky and 30 of the road."""
    return {
        "name": "a.body",
        "title": "a",
        "experts": 2,
        "health": {"load": [0.6, 0.4], "entropy": 0.97, "max_min": 1.5, "drop_rate": 0.0, "dead": []},
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


def report(layers: list[dict[str, Any]], rows: list[Any] | None = None, twin: Any = None) -> dict[str, Any]:
    interventions = None if rows is None else {"images": 9, "score": 0.5, "rows": rows}
    score = {"name": "mIoU", "value": 0.5}
    return {"layers": layers, "interventions": interventions, "score": score, "twin": twin}


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
    found = texts(layer_findings(layer()))
    assert (found["bad"], found["note"]) == ([], [])
    (text,) = found["good"]
    assert 'expert 1 serves 70.0 % of "road" and 40.0 % of all; expert 0 serves 90.0 % of "sky" and 60.0 %' in text


def test_a_layer_that_does_not() -> None:
    numbers = layer()["specialisation"] | {"with_class": 0.02, "with_class_given_position": 0.06}
    even = {"sky": [60, 40], "road": [60, 40]}
    found = texts(layer_findings(layer(specialisation=numbers, by_class=even)))
    assert found == {
        "good": [],
        "note": [],
        "bad": ["Experts do not differ by class: each class is spread over them as all patches are."],
    }
    by_place = numbers | {"with_position": 0.8}
    found = texts(layer_findings(layer(specialisation=by_place, by_class=even)))
    assert (
        "follows from the place alone: mutual information 0.80; among patches of one place the expert tells nothing"
        in (found["bad"][1])
    )
    found = texts(layer_findings(layer(specialisation=None, by_class={})))
    assert found["note"] == ["No patch has a class here, so nothing is known of experts and classes."]


def test_classes_spread_unevenly_without_an_owner() -> None:
    uneven = {"sky": [50, 50], "road": [55, 45]}
    (text,) = texts(layer_findings(layer(by_class=uneven)))["note"]
    assert text.startswith("No expert owns a class")
    numbers = layer()["specialisation"] | {"with_class": 0.02}
    (text,) = texts(layer_findings(layer(by_class=uneven, specialisation=numbers)))["note"]
    assert "among patches of one place they do" in text


def test_signs_of_an_ill_router() -> None:
    ill = {"load": [1.0, 0.0], "entropy": 0.0, "max_min": None, "drop_rate": 0.02, "dead": [1]}
    blind = {"gate": 0.55, "margin": 0.1, "entropy": 0.99}
    bad = texts(layer_findings(layer(health=ill, sharpness=blind)))["bad"]
    assert bad[0] == "Dead: no patch goes to expert 1."
    assert bad[1] == "2.0 % of the patches are dropped for lack of capacity."
    assert "mean gate value is 0.55, and 0.50 is that of one that cannot tell" in bad[2]
    uneven = layer()["health"] | {"max_min": 3.5}
    assert texts(layer_findings(layer(health=uneven)))["bad"] == [
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
    assert "mIoU falls from 50.0 % to 30.0 % (95 % interval -30.0 to -10.0 points)" in random
    assert "the best is expert 1" in single
    assert "missed most is 1 of a" in missed
    assert '-5.0 points (95 % interval -7.0 to -3.0), that of class "road" by -10.0.' in missed


def test_interventions_that_do_none() -> None:
    rows = [
        row("random expert", -0.01, 0.02),
        row("one expert for all", 0.01, 0.02, expert=0),
        row("knocked out", -0.01, 0.02, "a.body", 0),
    ]
    bad = texts(summary(report([layer()], rows)))["bad"]
    assert bad[0].startswith("Nothing shows that it matters which expert serves a patch")
    assert bad[1].startswith("It is not shown that more than one expert is needed; see expert 0")
    assert bad[2].endswith("The interval holds 0: no single expert is shown to be needed.")


def test_behind_the_twin_is_a_bad_sign_and_ahead_of_it_no_proof() -> None:
    for low, high, sign in ((0.01, 0.05, "note"), (-0.05, -0.01, "bad"), (-0.01, 0.05, "note")):
        twin = {"value": 0.4, "ahead": (low + high) / 2, "low": low, "high": high}
        found = texts(summary(report([layer()], twin=twin)))[sign]
        assert any("its dense twin's 40.0 %" in text for text in found)


def test_classes_that_are_owned_by_place_alone() -> None:
    numbers = layer()["specialisation"] | {"with_class_given_position": 0.05}
    (text,) = texts(layer_findings(layer(specialisation=numbers)))["note"]
    assert text.endswith("It may owe them to where they lie.")
    assert not any("clearest case" in each.text for each in summary(report([layer(specialisation=numbers)])))
    assert any("clearest case" in each.text for each in summary(report([layer()])))


def test_without_any_specialisation() -> None:
    numbers = layer()["specialisation"] | {"with_class": 0.02, "with_position": 0.7}
    found = texts(summary(report([layer(specialisation=numbers, by_class={"sky": [60, 40]})])))
    assert found["good"] == []
    assert found["bad"] == ["In no layer does the expert tell anything of the class: no expert specialises in classes."]
    assert found["note"] == ["In a much of the routing follows from where a patch lies, whatever is in it."]
