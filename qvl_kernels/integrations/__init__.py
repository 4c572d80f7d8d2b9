"""The kernels in other people's models: `integrations.torch` for whatever calls torch's attention,
`integrations.transformers`."""
