"""Every error DACO raises on purpose; a class says when, and derives from a builtin a caller would expect."""


class DacoError(Exception):
    """Base of all errors below; never raised itself."""


class FormatError(DacoError, ValueError):
    """A manifest, config, table or weight file breaks a rule of the format."""


class FormatTooNewError(FormatError):
    """A file was written by a newer major version of the format than this reader knows."""


class IntegrityError(FormatError):
    """A file is missing, truncated or altered: its size or sha256 differs from the manifest's."""


class ArtefactNotFoundError(DacoError, FileNotFoundError):
    """A repo, revision, folder or file that was asked for does not exist or may not be read."""


class UnsupportedModelError(DacoError, TypeError):
    """The text trunk of a model cannot be found."""


class UnknownLayerError(DacoError, IndexError):
    """A layer was asked for that the model, SAE or dictionary does not have."""


class ModelMismatchError(DacoError, ValueError):
    """The model is not the one the artefact was made for (shape, type, id or revision)."""


class NothingToSteerError(DacoError, ValueError):
    """An atom set or a scope matches nothing, so that steering could not do anything."""


class SteeringOnlyError(DacoError, ValueError):
    """Other atoms, another eta or the exact TopK was asked for, but only rows of labelled atoms are there."""


class SteeringConflictError(DacoError, RuntimeError):
    """The model is already steered, or in a mode (threads, graph replay) in which hooks would be wrong."""


class UnknownConceptError(DacoError, KeyError):
    """A concept was asked for that the dictionary, or no atom, has; names the nearest ones."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the message quoted


class RecipeError(DacoError, ValueError):
    """A recipe has an unknown section or field, or a value of the wrong type or range."""


class CorpusError(DacoError, ValueError):
    """A corpus cannot be read at all, or holds no usable row."""


class ActivationError(DacoError, ValueError):
    """Activations or training numbers are NaN or infinite, or there are none."""


class QuickStartError(DacoError, RuntimeError):
    """The code that a card prints as its quick start does not run, or there is none."""


class RefusedError(DacoError, ValueError):
    """A release was refused before anything left this machine; lists every reason."""


class PublishConflictError(DacoError, RuntimeError):
    """Somebody else moved the repo between planning and committing, again and again."""


class TagMovedError(DacoError, RuntimeError):
    """The tag already exists on another commit; tags never move."""


class HubUnavailableError(DacoError, ConnectionError):
    """The Hub did not answer properly within the bounded retries."""


class EndpointError(DacoError, ConnectionError):
    """A model behind HTTP refused a question, or did not answer it within the bounded retries."""


class EndpointQuestionError(EndpointError):
    """A model behind HTTP refused one question for what it says or for its length, not whoever asks."""


class VerificationError(DacoError, RuntimeError):
    """What was read back from the Hub differs from the manifest."""


class HubRefusedError(DacoError, PermissionError):
    """The Hub refused a request: not logged in, no right to write, or a rule of the Hub's own."""


class DiskError(DacoError, OSError):
    """A file could not be written: the disk is full, or the place is not writable."""
