"""The user's network: its layers and outputs, used inside a `with` that puts everything back.

| file or folder                      | what it is about                                           |
|-------------------------------------|------------------------------------------------------------|
| `checked_input`                     | what a caller gives: the input, masks on its grid          |
| `ensemble`                          | several networks, and flips, whose logits are averaged     |
| `outputs`, `layers`                 | which output are the logits; which layers are meant        |
| `layouts`, `layout_evidence`        | how a layer's tensor becomes (B, C, *s)                    |
| `capture/`                          | passes; activations and gradients of layers                |
| `untouched/`, `attributes`          | noting the state of a network, and putting it back         |
| `random_draws`                      | the same random numbers in every pass                      |
| `facts`, `structure`, `locks`       | what is known about a network, until it changes            |
| `grids/`                            | where the voxels of a layer lie in the input               |
| `suggest/`                          | which layers are worth explaining                          |
| `module_class`                      | of which class a module is, also in an exported program    |
"""
