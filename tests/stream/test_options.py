"""StreamOptions and StreamParams: how a client asks, and what is refused."""

import dataclasses

import pytest
from hypothesis import given, strategies as st

from outrider.errors import RequestError
from outrider.request import COMMIT_UNITS, StreamParams
from outrider.stream.options import StreamOptions

DEFAULTS = {
    "visibility": "verified",
    "retract": "tail",
    "min_stability": 0.8,
    "max_tail_tokens": 16,
    "max_updates_per_s": 12.0,
    "commit_unit": "token",
    "pacing": "burst",
    "pad": False,
    "steps": False,
}


def test_the_defaults_are_those_of_the_protocol():
    assert StreamOptions().as_dict() == DEFAULTS == StreamOptions.from_body({}).as_dict()
    assert StreamOptions().params == StreamParams()
    assert StreamOptions.from_body({}, pad=True).pad
    assert not StreamOptions.from_body({"pad": False}, pad=True).pad


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "visibility": st.sampled_from(["verified", "provisional"]),
            "retract": st.sampled_from(["tail", "none"]),
            "min_stability": st.floats(0, 1) | st.sampled_from([0, 1]),
            "max_tail_tokens": st.integers(1, 64),
            "max_updates_per_s": st.floats(0.1, 100) | st.integers(1, 60),
            "commit_unit": st.sampled_from(COMMIT_UNITS),
            "pacing": st.sampled_from(["burst", "smooth"]),
            "pad": st.booleans(),
        },
    )
)
def test_body_and_header_say_the_same_and_the_echo_can_be_sent_back(body):
    options = StreamOptions.from_body(body)
    assert StreamOptions.from_body(options.as_dict()) == options
    header = "; ".join(f"{k}={str(v).lower()}" for k, v in body.items())
    assert not body or StreamOptions.from_header(header) == options
    for name, value in body.items():
        assert name == "visibility" or options.as_dict()[name] == value


def test_the_header_of_the_protocol():
    options = StreamOptions.from_header("provisional; stability=0.5;commit_unit=word ; pad=true")
    assert (options.visibility, options.min_stability) == ("provisional", 0.5)
    assert (options.commit_unit, options.pad) == ("word", True)
    assert StreamOptions.from_header("verified").params == StreamParams()


def test_who_cannot_take_text_back_sees_verified_text_only():
    body = {"visibility": "provisional", "retract": "none", "commit_unit": "sentence"}
    options = StreamOptions.from_body(body)
    assert options.visibility == options.as_dict()["visibility"] == "verified"
    assert not options.params.is_provisional
    assert options.params.commit_unit == "sentence"


def test_only_smooth_pacing_waits():
    assert StreamOptions().pace_s == 0
    assert StreamOptions(pacing="smooth").pace_s > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"visibilty": "verified"}, "unknown stream option 'visibilty'; did you mean 'visibility'"),
        ({"visibility": "all"}, "visibility='all': must be one of verified, provisional"),
        ({"visibility": None}, "visibility=None: must be one of"),
        ({"visibility": ["verified"]}, "visibility=.*: must be one of"),
        ({"retract": True}, "retract=True: must be one of tail, none"),
        ({"min_stability": 1.5}, r"min_stability=1.5: must lie in \[0, 1\]"),
        ({"min_stability": float("nan")}, "min_stability=nan"),
        ({"min_stability": "0.8"}, "min_stability='0.8'"),
        ({"min_stability": True}, "min_stability=True"),
        ({"max_tail_tokens": 0}, r"max_tail_tokens=0: must lie in \[1, 64\]"),
        ({"max_tail_tokens": 2.5}, "max_tail_tokens=2.5"),
        ({"max_updates_per_s": 0}, "max_updates_per_s=0: must be a number above 0"),
        ({"max_updates_per_s": float("inf")}, "max_updates_per_s=inf"),
        ({"max_updates_per_s": "12"}, "max_updates_per_s='12'"),
        ({"commit_unit": "page"}, "commit_unit='page': must be one of token, word, sentence, line"),
        ({"pacing": "slow"}, "pacing='slow': must be one of burst, smooth"),
        ({"pad": 1}, "pad=1: must be true or false"),
        ({1: 2}, "unknown stream option '1'"),
        ("provisional", "stream_options.outrider='provisional': must be a mapping"),
        (None, "must be a mapping"),
    ],
)
def test_a_bad_body_is_refused_with_the_remedy(body, message):
    with pytest.raises(RequestError, match=message):
        StreamOptions.from_body(body)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "visibility='': must be one of"),
        ("everything", "visibility='everything': must be one of"),
        ("provisional; stability=high", "min_stability='high'"),
        ("provisional; stability=nan", "min_stability=nan"),
        ("provisional; stabilty=0.8", "unknown stream option 'stabilty'"),
        ("provisional; stability", "'stability' is not of the form name=value; write it as"),
        ("provisional; stability=1; min_stability=0", "min_stability is given twice"),
        ("provisional; visibility=verified", "visibility is given twice"),
        ("provisional;", "'' is not of the form"),
        ("provisional; max_tail_tokens=2.5", "max_tail_tokens='2.5'"),
        ("provisional; pad=yes", "pad='yes': must be true or false"),
    ],
)
def test_a_bad_header_is_refused_with_the_remedy(header, message):
    with pytest.raises(RequestError, match=message):
        StreamOptions.from_header(header)


def test_parameters_check_themselves_under_the_same_names():
    for name in dataclasses.asdict(StreamParams()):
        with pytest.raises(RequestError, match=f"{name}='no'"):
            StreamParams(**{name: "no"})
