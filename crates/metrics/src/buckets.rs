//! Bounds of histograms. They are dense where targets usually lie, since a quantile is only known between two bounds: 0.2 s to
//! 10 s for the first token, 10 ms to 200 ms for the next ones. They reach far beyond, so that a system that is overloaded or
//! a model that is large still shows how slow it is, and they never change with the model: histograms of different gangs and
//! releases can be added up.

/// What a client waits for: the queue, the first token, a whole answer.
pub(crate) const REQUEST_SECONDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0,
    120.0, 300.0, 900.0,
];

/// What a token takes: a step, the time between two tokens.
pub(crate) const TOKEN_SECONDS: &[f64] = &[
    0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0,
    2.5, 5.0, 10.0,
];

/// What is counted in a step: powers of two.
pub(crate) const STEP_COUNTS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0];

/// From a reconciliation that changes nothing to one that waits for an API server.
pub(crate) const RECONCILE_SECONDS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0];
