"""Pictures as text inside a page. Reads and writes nothing."""

import base64
import io

from PIL import Image


def data_url(picture: Image.Image) -> str:
    """A picture as a `data:` address of a PNG."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
