//! The numbers of service ports, under which programs remember clients and count.
//!
//! In: ports that come and go. Out: numbers, small ones first, so that what is indexed by them stays small.

/// Numbers from 0 on.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    end: u32,
    free: Vec<u32>,
}

impl Numbers {
    /// Numbers of which these are taken.
    pub(super) fn with_taken(taken: impl Iterator<Item = u32>) -> Self {
        let mut taken: Vec<u32> = taken.collect();
        taken.sort_unstable();
        taken.dedup();
        let mut numbers = Self::default();
        for number in taken {
            numbers.free.extend(numbers.end..number);
            numbers.end = number + 1;
        }
        numbers.free.reverse();
        numbers
    }

    /// One more than the largest number ever taken.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    pub(super) fn take(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.end += 1;
            self.end - 1
        })
    }

    pub(super) fn give_back(&mut self, number: u32) {
        self.free.push(number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_numbers_come_first_and_none_twice() {
        let mut numbers = Numbers::with_taken([4, 1, 4].into_iter());
        let taken: Vec<u32> = (0..4).map(|_| numbers.take()).collect();
        assert_eq!(taken, [0, 2, 3, 5]);
        numbers.give_back(2);
        assert_eq!((numbers.take(), numbers.take(), numbers.end()), (2, 6, 7));
    }
}
