"""Where the weights of known models are published, for ``amskv convert NAME``.

An address has the revision and the checksum with which it was found in public sources that have
downloaded the file: the owners of a repository can replace its files, and have done so. An address
without them is taken as it is found; ``amskv convert`` says so, with the address to write here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

_VAR = "hf://FoundationVision/var@6d0ee6598a42f75079aa79e58b012b57b284c91b"
_VQVAE = (
    f"{_VAR}/vae_ch160v4096z32.pth"
    "#sha256=7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c"
)
_INFINITY = "hf://FoundationVision/Infinity"
_FLAN_T5_XL = "hf://google/flan-t5-xl@7d6315df2c2fb742f0f5b556879d730926ca9001"


@dataclass(frozen=True)
class Published:
    """Published weights of one model.

    Attributes:
      description: a few words.
      kind: of the model, see ``models.kinds``.
      parts: address of the file or folder with a part's weights, by the part's name.
    """

    description: str
    kind: str
    parts: Mapping[str, str]


def _var(what: str, file: str) -> Published:
    return Published(what, "var", {"transformer": f"{_VAR}/{file}", "tokenizer": _VQVAE})


PUBLISHED: dict[str, Published] = {
    "var-d16": _var(
        "VAR-d16, 256 pixels",
        "var_d16.pth#sha256=4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
    ),
    "var-d20": _var(
        "VAR-d20, 256 pixels",
        "var_d20.pth#sha256=f7d232978e6fe82a4f2e0f5d82b012e01b1aa5abfe93ce2b56104ec0e878a10f",
    ),
    "var-d24": _var(
        "VAR-d24, 256 pixels",
        "var_d24.pth#sha256=12c03619b2d3906ed19fe59539a90aadf60d72287dbaa31cf540435e76ddf789",
    ),
    "var-d30": _var(
        "VAR-d30, 256 pixels",
        "var_d30.pth#sha256=7b11551dd4d794c7d6ed10b3d2822d42efe609a86128171b646e543dd2633b56",
    ),
    "var-d36": _var("VAR-d36, 512 pixels", "var_d36.pth"),
    "infinity-125m": Published(
        "Infinity-125M, 256 pixels, with its text encoder",
        "infinity",
        {
            "transformer": f"{_INFINITY}/infinity_125M_256x256.pth",
            "tokenizer": f"{_INFINITY}/infinity_vae_d16.pth",
            "text_encoder": _FLAN_T5_XL,
        },
    ),
    "infinity-2b": Published(
        "Infinity-2B with its text encoder",
        "infinity",
        {
            "transformer": f"{_INFINITY}/infinity_2b_reg.pth",
            "tokenizer": f"{_INFINITY}/infinity_vae_d32reg.pth",
            "text_encoder": _FLAN_T5_XL,
        },
    ),
    "infinity-8b": Published(
        "Infinity-8B with its text encoder",
        "infinity",
        {
            "transformer": f"{_INFINITY}/infinity_8b_weights",
            "tokenizer": f"{_INFINITY}/infinity_vae_d56_f8_14_patchify.pth",
            "text_encoder": _FLAN_T5_XL,
        },
    ),
}
"""Published models by name, each with the parts that ``amskv convert`` takes."""
