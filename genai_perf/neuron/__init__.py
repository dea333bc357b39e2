"""AWS Neuron: the NKI interpreter, host detection, metrics, export for serving."""
