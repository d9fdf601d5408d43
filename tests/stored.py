"""A writer of safetensors files for numbers of every width."""

import json

DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def save_by_hand(tensors, path):
    """A safetensors file with dtypes that the library's numpy side cannot write."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in tensors.items():
        at = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": DTYPES[str(x.dtype)], "shape": x.shape, "data_offsets": at}
        data += x.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
