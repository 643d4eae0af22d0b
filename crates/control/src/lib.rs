//! Pure: what a LlamaDeployment should become, and what has become of it.
