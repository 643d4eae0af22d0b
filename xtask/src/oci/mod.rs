//! Container images without a container engine: made into OCI layout folders, and pushed to registries.

pub(crate) mod base;
mod challenge;
mod client;
mod credentials;
mod image;
mod layer;
mod layout;
mod push;
mod registry;
#[cfg(test)]
mod tests;

pub(crate) use client::Client;
pub(crate) use credentials::Credentials;
pub(crate) use image::Recipe;
pub(crate) use layer::Layer;
pub(crate) use layout::Layout;
pub(crate) use push::{Pushed, Target, push};
pub(crate) use registry::Registry;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Not compressed: weights do not shrink, and a layer's content is its blob.
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// What Kubernetes and OCI call this machine's architecture.
pub(crate) fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}
