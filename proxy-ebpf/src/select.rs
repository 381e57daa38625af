//! The choice of a random slot.
//!
//! In: a random number. Out: a slot; all slots have the same probability.

/// Selects one of `count` slots by a random number; `None` if there are none.
///
/// The number is scaled instead of reduced by remainder: that is one multiplication, and no slot is favoured
/// by more than `count / 2^32`.
#[inline(always)]
pub const fn select(random: u32, count: u32) -> Option<u32> {
    if count == 0 {
        return None;
    }
    Some(((random as u64 * count as u64) >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::select;

    #[test]
    fn selection_stays_inside_the_set() {
        for count in [1, 2, 3, 7, 1000, u32::MAX] {
            for random in [0, 1, u32::MAX / 2, u32::MAX - 1, u32::MAX] {
                assert!(select(random, count).is_some_and(|slot| slot < count), "{random} of {count}");
            }
        }
        assert_eq!(select(7, 0), None);
    }

    #[test]
    fn selection_is_even() {
        let mut hits = [0u32; 3];
        for step in 0..30_000u32 {
            let slot = select(step.wrapping_mul(143_165), 3).map(|slot| slot as usize);
            hits[slot.unwrap()] += 1;
        }
        assert!(hits.iter().all(|&hit| (9_900..=10_100).contains(&hit)), "{hits:?}");
    }
}
