"""Loads the model that a command line asks for, with its processor: safetensors alone, no code of a repo."""

import sys
from pathlib import Path
from typing import Any

import torch

from daco.errors import ArtefactNotFoundError
from daco.sites import ModelFacts

NEVER = {"trust_remote_code": False}
"""Left out, transformers would ask at a terminal whether to run a repo's code."""


def quiet() -> None:
    """No remarks of libraries, and no progress bars where nobody watches."""
    import huggingface_hub.utils.logging
    import transformers.utils.logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    logging: Any = transformers.utils.logging  # not typed
    logging.set_verbosity_error()
    hub: Any = huggingface_hub.utils.logging
    hub.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
        disable_progress_bars()


def place_of(base: ModelFacts, name: str | None) -> tuple[str, str | None]:
    """Where the model is: what was asked for, `org/name@revision` or a folder, else the release's own.

    Raises:
        ArtefactNotFoundError: nothing was asked for, and the release names no model.
    """
    if name:
        if Path(name).is_dir():
            return name, None
        repo, _, revision = name.partition("@")
        return repo, revision or None
    if not base.id:
        raise ArtefactNotFoundError(
            f"expected --model, a folder or org/name of a {base.model_type} with {base.n_layers} layers "
            f"of width {base.hidden_size}, got none; the release names no base model"
        )
    return base.id, base.revision or None


def load(name: str, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """Load a model (eval mode) and its processor, or its tokenizer where it takes text alone.

    Args:
        name: Hub id or folder.
        revision: Tag, branch or commit of a Hub id.
        device: As torch takes it; empty: a GPU where there is one.
        dtype: `auto` or a torch name.

    Raises:
        ArtefactNotFoundError: transformers cannot load it.
    """
    where: dict[str, Any] = NEVER | ({"revision": revision} if revision else {})
    try:
        return _load(name, where, device or ("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        first = _first_cause(error)
        said = str(first).strip().partition("\n")[0] or type(first).__name__
        advice = "check name, revision and login, or give --model"
        if "torchvision::" in said:  # what torch says of it names neither the package nor what to do
            said, advice = (
                "a torchvision built for another torch",
                f"install the torchvision that goes with torch {torch.__version__}",
            )
        raise ArtefactNotFoundError(
            f"expected a model that transformers can load at {name!r}, got: {said}; {advice}"
        ) from error


def _first_cause(error: BaseException) -> BaseException:
    """What an import failed of: transformers says only which of its own modules it was."""
    while isinstance(error, ImportError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _load(name: str, where: dict[str, Any], device: str, dtype: str) -> tuple[Any, Any]:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    config = transformers.AutoConfig.from_pretrained(name, **where)
    multimodal = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    readers: tuple[Any, Any] = (
        (transformers.AutoProcessor, transformers.AutoModelForImageTextToText)
        if multimodal
        else (transformers.AutoTokenizer, transformers.AutoModelForCausalLM)
    )
    processor = readers[0].from_pretrained(name, **where)
    model = readers[1].from_pretrained(name, dtype=dtype, use_safetensors=True, **where)
    return model.to(device).eval(), processor


def open_image(path: str) -> Any:
    """Read an image file as RGB.

    Raises:
        ArtefactNotFoundError: there is none, or it is no image.
    """
    from PIL import Image

    file = Path(path.strip().strip("'\"")).expanduser()
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        got = "none" if not file.is_file() else type(error).__name__
        raise ArtefactNotFoundError(
            f"expected an image at {str(file)!r}, got {got}; check the path"
        ) from error
