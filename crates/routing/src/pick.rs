//! Least load, over unified gangs and (prefill, decode) pairs alike.

use std::collections::BTreeMap;

use crate::{GangView, Phase, Role};

/// Indices into the gangs that [`pick`] was given.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// One gang computes the prompt and decodes.
    Unified {
        /// That gang.
        gang: usize,
    },
    /// One computes the prompt, the other decodes; both have the same KV fingerprint.
    Apart {
        /// Computes the prompt.
        prefill: usize,
        /// Is called, and calls `prefill`.
        decode: usize,
    },
}

impl Route {
    /// The gang that the gateway calls.
    pub fn called(self) -> usize {
        match self {
            Self::Unified { gang } => gang,
            Self::Apart { decode, .. } => decode,
        }
    }

    /// The gang that computes the prompt.
    pub fn prefills(self) -> usize {
        match self {
            Self::Unified { gang } => gang,
            Self::Apart { prefill, .. } => prefill,
        }
    }
}

/// Why no gang takes the request now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    /// The fleet has none for this model, or none that can be reached.
    #[error("no gang is ready")]
    NoGang,
    /// All that can be reached are draining.
    #[error("every gang is draining")]
    Draining,
    /// Decode gangs wait for a prefill gang of their KV fingerprint.
    #[error("no prefill gang is ready")]
    NoPrefill,
    /// Prefill gangs wait for a decode gang of their KV fingerprint.
    #[error("no decode gang is ready")]
    NoDecode,
    /// There are gangs, and each has as many requests as it may hold: come back later.
    #[error("every gang is full")]
    Full,
}

/// Picks the route of least load among the ready gangs that are not full. A pair costs what the busier of its two costs.
/// A route with fewer gangs to be avoided goes first. Routes that cost the same take turns:
/// `turn` counts requests, and neighbouring values give neighbouring routes.
pub fn pick(gangs: &[GangView], turn: u64) -> Result<Route, Refusal> {
    // (gangs to be avoided in it, cost, route)
    let mut open: Vec<(u8, u64, Route)> = Vec::new();
    let mut pairs: BTreeMap<&str, (Vec<usize>, Vec<usize>)> = BTreeMap::new();
    for (index, gang) in gangs.iter().enumerate() {
        if gang.phase != Phase::Ready || gang.full() {
            continue;
        }
        let (prefill, decode) = pairs.entry(&gang.kv_fingerprint).or_default();
        match gang.role {
            Role::Unified => open.push((u8::from(gang.avoid), gang.cost(), Route::Unified { gang: index })),
            Role::Prefill => prefill.push(index),
            Role::Decode => decode.push(index),
        }
    }
    let order = |index: &usize| (u8::from(gangs[*index].avoid), gangs[*index].cost());
    for (prefills, decodes) in pairs.values() {
        for prefill in least(prefills, order) {
            for decode in least(decodes, order) {
                let (p, d) = (order(&prefill), order(&decode));
                open.push((p.0 + d.0, p.1.max(d.1), Route::Apart { prefill, decode }));
            }
        }
    }
    let best = least(&open, |(avoid, cost, _)| (*avoid, *cost));
    let turn = (turn % best.len().max(1) as u64) as usize;
    best.get(turn).map(|(_, _, route)| *route).ok_or_else(|| refusal(gangs))
}

/// All that come first, in their order.
fn least<T: Clone, K: Ord>(items: &[T], key: impl Fn(&T) -> K) -> Vec<T> {
    let Some(best) = items.iter().map(&key).min() else { return Vec::new() };
    items.iter().filter(|item| key(item) == best).cloned().collect()
}

fn refusal(gangs: &[GangView]) -> Refusal {
    let ready = |role: Role| {
        gangs.iter().filter(move |gang| gang.phase == Phase::Ready && gang.role == role).collect::<Vec<_>>()
    };
    let (unified, prefill, decode) = (ready(Role::Unified), ready(Role::Prefill), ready(Role::Decode));
    let paired = prefill.iter().any(|p| decode.iter().any(|d| d.kv_fingerprint == p.kv_fingerprint));
    if !unified.is_empty() || paired {
        Refusal::Full
    } else if !decode.is_empty() {
        Refusal::NoPrefill
    } else if !prefill.is_empty() {
        Refusal::NoDecode
    } else if gangs.iter().any(|gang| gang.phase == Phase::Draining) {
        Refusal::Draining
    } else {
        Refusal::NoGang
    }
}
