"""The page's terms, explained where they stand: on hover, and by a tap or a key.

Each explanation is there once, as a popover at the end of the page; a term is a button that opens it.
"""

from __future__ import annotations

from nest_runtime.escape import clean
from nest_runtime.measures import MEASURES

TERMS = {
    **{measure.title: measure.about for measure in MEASURES.values()},
    "garbled": "The share of harmful requests whose answer neither refuses nor complies. "
    "A model that babbles counts as safe in attack success, and is of no use.",
    "trained numbers": "How many numbers the method stores in its file. The model's own stay as they are.",
    "safety patch": "A small file that changes some neurons of a model, so that it refuses harmful requests. "
    "It is switched on and off while the model runs.",
    "base": "The model as it was published, without a patch.",
    "neuron": "One output of a layer's projection, that is, one row of its matrix of weights.",
    "gate_proj": "The first matrix of a layer's feed-forward part: decides how far each neuron of up_proj counts.",
    "up_proj": "The second matrix of a layer's feed-forward part: what each neuron says, before gate_proj weighs it.",
    "fc_proj": "The first matrix of a layer's feed-forward part, in models without a gate.",
    "cluster": "Neurons that react alike. All neurons of a cluster share one trained update.",
    "z-score": "How strongly a neuron tells harmful prompts from harmless ones, in standard deviations "
    "from the mean of its projection.",
    "loading": "How much of its cluster's update a neuron gets.",
    "silhouette": "How well the clusters are set apart: 1 is far apart, 0 is not at all.",
    "digest": "The patch's name that cannot be mistaken: SHA-256 over what is in it.",
    "wrapping": "A text around a request that is meant to get around the refusal.",
    "family": "A kind of jailbreak: wrappings that work by the same trick.",
    "method": "How the model was made to refuse. NeST trains a few numbers for neurons that tell harmful from "
    "harmless; random neurons is the same with neurons drawn by lot. LoRA trains small matrices beside the weights, "
    "full all weights, circuit breakers bend the states of harmful prompts. In-context adds a rule to the prompt; "
    "filter looks at the prompt alone.",
    "95 % interval": "Where the true share lies, with a confidence of 95 %: Wilson's interval. "
    "Few prompts make it wide.",
    "serial": "A number that grows from one published version of a patch to the next.",
    "neurons + − =": "How many neurons the second version adds (+), leaves out (−), and has in common with the "
    "first one (=).",
    "norm of the change": "How much the updates of the neurons in common differ: the length of the difference. "
    "0 is no difference.",
    "cosine": "How far the updates of the neurons in common point the same way: 1 is the same direction, 0 is none in "
    "common, −1 is the opposite.",
    "signature": "Who vouches for the patch. It is checked where a key is trusted; `nest-runtime verify` says more.",
}


def term(name: str, words: str = "") -> str:
    """A term that explains itself.

    Args:
        name: of TERMS.
        words: what stands on the page, where that is another form of the name.
    """
    shown, said = clean(words or name), TERMS[name].replace("`", "")
    return f'<button type="button" class="nr-term" popovertarget="{_id(name)}" title="{said}">{shown}</button>'


def titled(name: str) -> str:
    """A table's title as HTML: explained where it is a term."""
    return term(name) if name in TERMS else clean(name)


def popovers() -> str:
    """All explanations, for the end of the page."""
    return "".join(
        f'<div popover id="{_id(name)}" class="nr-said"><b>{name}</b><br>{said.replace("`", "")}</div>'
        for name, said in TERMS.items()
    )


def _id(name: str) -> str:
    return "term-" + "".join(letter if letter.isalnum() else "-" for letter in name)
