//! Who gets what is left of a GPU budget.

use herd_api::Role;

/// Gangs that a pool would like to have more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ask {
    pub(super) role: Role,
    pub(super) gangs: i64,
    /// Of a gang.
    pub(super) ranks: i64,
}

/// Of `left` ranks, gangs for each ask, in its order: all where there is room for all; else in proportion to what was asked,
/// and what rounding leaves over to the one that lacks most. Of two that lack the same, decode comes before unified and
/// prefill: prompts can wait, streams that run cannot.
pub(super) fn share(left: i64, asks: &[Ask]) -> Vec<i64> {
    let cost: i64 = asks.iter().map(|ask| ask.gangs * ask.ranks).sum();
    if cost <= left {
        return asks.iter().map(|ask| ask.gangs).collect();
    }
    let mut left = left.max(0);
    let (whole, budget) = (i128::from(cost.max(1)), i128::from(left));
    let part = |ask: &Ask| i128::from(ask.gangs) * budget;
    let mut shares: Vec<i64> = asks.iter().map(|ask| (part(ask) / whole) as i64).collect();
    left -= shares.iter().zip(asks).map(|(share, ask)| share * ask.ranks).sum::<i64>();
    let mut order: Vec<usize> = (0..asks.len()).collect();
    order.sort_by_key(|index| (-(part(&asks[*index]) % whole), yields(asks[*index].role)));
    while let Some(next) =
        order.iter().copied().find(|index| shares[*index] < asks[*index].gangs && asks[*index].ranks <= left)
    {
        shares[next] += 1;
        left -= asks[next].ranks;
        // The others first, the next time.
        order.retain(|index| *index != next);
        order.push(next);
    }
    shares
}

/// Who has more yields first.
fn yields(role: Role) -> u8 {
    match role {
        Role::Decode => 0,
        Role::Unified => 1,
        Role::Prefill => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(role: Role, gangs: i64, ranks: i64) -> Ask {
        Ask { role, gangs, ranks }
    }

    #[test]
    fn what_fits_is_given() {
        assert_eq!(share(24, &[ask(Role::Prefill, 1, 8), ask(Role::Decode, 2, 8)]), [1, 2]);
        assert_eq!(share(0, &[ask(Role::Prefill, 0, 8), ask(Role::Decode, 0, 8)]), [0, 0]);
    }

    #[test]
    fn what_does_not_fit_is_proportioned() {
        assert_eq!(share(6, &[ask(Role::Prefill, 3, 1), ask(Role::Decode, 9, 1)]), [1, 5]);
        assert_eq!(share(4, &[ask(Role::Prefill, 3, 1), ask(Role::Decode, 9, 1)]), [1, 3]);
        // A gang of 4 has no room in what is left, one of 1 has.
        assert_eq!(share(3, &[ask(Role::Prefill, 5, 1), ask(Role::Decode, 1, 4)]), [3, 0]);
    }

    #[test]
    fn of_two_that_ask_the_same_prefill_yields() {
        assert_eq!(share(8, &[ask(Role::Prefill, 1, 8), ask(Role::Decode, 1, 8)]), [0, 1]);
        assert_eq!(share(7, &[ask(Role::Prefill, 1, 8), ask(Role::Decode, 1, 8)]), [0, 0]);
    }

    #[test]
    fn a_budget_that_is_overdrawn_gives_nothing() {
        assert_eq!(share(-8, &[ask(Role::Prefill, 1, 8), ask(Role::Decode, 2, 8)]), [0, 0]);
    }
}
