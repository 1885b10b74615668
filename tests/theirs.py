"""Tiny models of transformers with every parameter drawn anew, and their names here."""

import numpy as np

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
FIELDS = {
    "ViT": SHAPE | {"intermediate_size": 48, "image_size": 16, "patch_size": 8},
    "Bert": SHAPE | {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 24},
    "Roberta": SHAPE
    | {"intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 24}
    | {"type_vocab_size": 1},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}
    | {"layer_type": "basic"},
}
CLASSES = {name: f"{name}ForSequenceClassification" for name in ("Bert", "Roberta")}
CLASSES |= {name: f"{name}ForImageClassification" for name in ("ViT", "ResNet")}

# Part of a module's name in transformers 5 -> ours; the longer ones first.
NAMES = {
    "bert.encoder.layer.": "blocks.",
    "roberta.encoder.layer.": "blocks.",
    "attention.self.": "attention.",
    "attention.output.dense": "attention.out",
    "intermediate.dense": "mlp.up",
    "output.dense": "mlp.down",
    "bert.embeddings.word_embeddings": "embed.word",
    "bert.pooler.dense": "pooler",
    "vit.layers.": "blocks.",
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "out",
    "mlp.fc1": "mlp.up",
    "mlp.fc2": "mlp.down",
    "vit.embeddings.patch_embeddings.projection": "embed.patch",
    "resnet.encoder.stages.0.layers.0": "blocks.0",
    "resnet.encoder.stages.1.layers.0": "blocks.1",
    "resnet.encoder.stages.1.layers.1": "blocks.2",
    "layer.0.convolution": "conv1",
    "layer.1.convolution": "conv2",
    "shortcut.convolution": "shortcut.conv",
}


def ours(module):
    for theirs, name in NAMES.items():
        module = module.replace(theirs, name)
    return "params/" + module.replace(".", "/")


def make_base(name, folder, **fields):
    """Save a transformers model with every parameter drawn anew, and open it."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, CLASSES[name])(
        getattr(transformers, f"{name}Config")(**FIELDS[name], **fields)
    )
    with torch.no_grad():
        for tensor in model.parameters():
            around_one = tensor.ndim == 1 and bool((tensor == 1).all())
            tensor.copy_(torch.rand_like(tensor) + 0.5 if around_one else tensor)
            tensor.add_(torch.randn_like(tensor) * (0 if around_one else 0.1))
        for path, tensor in model.named_buffers():
            if path.endswith("running_var"):
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    model.save_pretrained(folder)
    return model.eval()


def inputs_of(name):
    rng = np.random.default_rng(0)
    if name in ("ViT", "ResNet"):
        return (rng.normal(size=(3, 16, 16, 3)).astype(np.float32),)
    ids = rng.integers(3, 60, (3, 11)).astype(np.int32)
    return ids, (np.arange(11) < np.array([[11], [7], [4]])).astype(np.int32)


def logits_of(model, name):
    import torch

    tensors = [torch.from_numpy(x) for x in inputs_of(name)]
    with torch.no_grad():
        if tensors[0].ndim == 4:
            return model(tensors[0].permute(0, 3, 1, 2)).logits.numpy()
        ids, mask = (x.long() for x in tensors)
        return model(input_ids=ids, attention_mask=mask).logits.numpy()
