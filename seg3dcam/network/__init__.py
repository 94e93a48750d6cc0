"""The user's network: its layers and outputs, used inside a `with` that puts everything back.

| file or folder                      | what it is about                                           |
|-------------------------------------|------------------------------------------------------------|
| `checked_input`                     | checks of a caller's input, and of masks on its grid       |
| `ensemble`                          | several networks, and flips, whose logits are averaged     |
| `outputs`, `layers`                 | which output are the logits; which layers are meant        |
| `layouts`, `layout_evidence`        | how a layer's tensor becomes (B, C, *s)                    |
| `capture/`                          | passes; activations and gradients of layers                |
| `untouched/`, `attributes`          | noting the state of a network, and putting it back         |
| `random_draws`                      | the same random numbers in every pass                      |
| `facts`, `structure`, `locks`       | what is known about a network, until it changes            |
| `grids/`                            | where the voxels of a layer lie in the input               |
| `suggest/`                          | which layers are worth explaining                          |
| `module_class`                      | the class of a module, also in an exported program         |
"""
