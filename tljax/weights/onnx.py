"""A DINOv2 exported to ONNX -> the tensors of the Hugging Face folder it came from."""

import numpy as np

from tljax.types import BadInput

BACKBONE = "backbone."


def read_onnx(data: bytes, origin: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the backbone's tensors by Hugging Face name, and the reason for each one left out.

    The exporter kept the names of biases, norms and convolutions.  Dense kernels are anonymous and
    transposed: the named bias added to the product tells whose.  The position table is anonymous
    and cut in two, class and patches.

    Raises: BadInput for bytes that are not such a graph, or a tensor that finds no name.
    """
    try:
        import onnx  # an extra: only this source needs it
        from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    except ImportError:
        raise BadInput(f"{origin} needs the package onnx: pip install 'tljax[demo]'") from None
    try:
        graph = onnx.load_from_string(data).graph
    except DecodeError as error:
        raise BadInput(f"{origin}: not a whole ONNX file ({error}); fetch it again") from None
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    named = {name: tensor for name, tensor in tensors.items() if not name.startswith("onnx::")}
    bias = {
        name: other
        for node in graph.node
        if node.op_type == "Add" and len(node.input) == 2
        for name, other in (node.input, node.input[::-1])
    }
    position = {}
    for node in graph.node:
        for source in tensors.keys() & set(node.input) - named.keys():
            module, _, leaf = bias.get(node.output[0], "").rpartition(".")
            if node.op_type == "MatMul" and leaf == "bias" and f"{module}.weight" not in named:
                named[f"{module}.weight"] = tensors[source].T
            else:
                position[node.op_type] = tensors[source]
    if position.keys() != {"Concat", "Reshape"}:
        raise BadInput(f"{origin}: unnamed tensors feed {sorted(position)}: not a known export")
    table = np.concatenate([position["Concat"], position["Reshape"]], axis=1)
    named[f"{BACKBONE}embeddings.position_embeddings"] = table
    reason = "saliency decoder, not part of the backbone"
    ignored = {name: reason for name in named if name.startswith("decoder.")}
    return {n.removeprefix(BACKBONE): named[n] for n in named.keys() - ignored.keys()}, ignored
