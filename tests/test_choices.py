"""The suggestion for a misspelt word; what one part may be asked for is what the other understands."""

import subprocess
import sys
from typing import get_args

import pcenet.data
from pcenet.choices import Augment, Part, Split, did_you_mean
from pcenet.runs.config import EvalConfig, TrainConfig
from pcenet.runs.options import options_of


def test_the_nearest_is_named_however_far():
    assert did_you_mean("bath_size", ["lr", "batch_size", "seed"]) == "; did you mean 'batch_size'?"
    assert did_you_mean("zzz", ["lr"]) == "; did you mean 'lr'?"


def test_on_request_only_a_similar_one_is_named():
    # "abcd" and "abxy" share 2 of 4 letters: a similarity of 0.5.
    assert did_you_mean("abcd", ["abxy"], similarity=0.5) == "; did you mean 'abxy'?"
    assert did_you_mean("abcd", ["abxy"], similarity=0.51) == ""
    assert did_you_mean("abcd", []) == ""


def test_training_offers_what_data_understands():
    assert options_of(TrainConfig)["augment"][0] is pcenet.data.Augment is Augment
    assert options_of(EvalConfig)["split"][0] is Part
    assert pcenet.data.Split is Split
    assert get_args(Split) == ("train", "val", "test")
    assert get_args(Part) == (*get_args(Split), "all")


def test_the_command_line_gets_them_without_torch():
    code = "import sys, pcenet.choices; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
