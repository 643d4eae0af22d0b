//! The fleet on a real Kubernetes.
