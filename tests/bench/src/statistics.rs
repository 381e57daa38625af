//! Statistics of samples: quantiles, and how sure a ratio is.
//!
//! In: raw samples. Out: a few numbers that stand for them.

use std::fmt;

const RESAMPLES: usize = 4000;
/// Where resampling starts: the same samples have the same interval, always.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// The value that this part of the samples does not exceed; not a number when there are none.
pub(super) fn quantile(mut samples: Vec<f64>, part: f64) -> f64 {
    samples.sort_by(f64::total_cmp);
    let index = (samples.len() as f64 * part).ceil() as usize;
    samples.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// The parts that `quantiles` are given for.
pub const PARTS: [f64; 4] = [0.5, 0.9, 0.99, 0.999];

/// [`quantile`] for all [`PARTS`]; none when there are no samples.
pub(super) fn quantiles(mut samples: Vec<f64>) -> Vec<f64> {
    samples.sort_by(f64::total_cmp);
    let at =
        |part: &f64| samples.get(((samples.len() as f64 * part).ceil() as usize).saturating_sub(1)).copied();
    PARTS.iter().filter_map(at).collect()
}

/// A number, and where it lies with 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Estimate {
    pub(super) point: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

/// Reads like `0.987 (0.980 to 0.991)`, with fewer digits where the number is large.
impl fmt::Display for Estimate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = match self.point {
            point if point < 2.0 => 3,
            point if point < 20.0 => 1,
            _ => 0,
        };
        write!(f, "{:.digits$} ({:.digits$} to {:.digits$})", self.point, self.low, self.high)
    }
}

/// The middle of the samples, by bootstrap over them. Each sample has to be a ratio of two rates of one round, so that
/// what the rest of the machine did in that round is in both.
pub(super) fn estimate(samples: &[f64]) -> Estimate {
    if samples.is_empty() {
        return Estimate { point: f64::NAN, low: f64::NAN, high: f64::NAN };
    }
    let mut random = SEED;
    let mut resampled = vec![0.0; samples.len()];
    let middles: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            for sample in &mut resampled {
                *sample = samples[(next(&mut random) % samples.len() as u64) as usize];
            }
            middle(&mut resampled)
        })
        .collect();
    Estimate {
        point: middle(&mut samples.to_vec()),
        low: quantile(middles.clone(), 0.025),
        high: quantile(middles, 0.975),
    }
}

/// With fewer samples a bootstrap says nothing.
pub(super) const ENOUGH: usize = 4;

/// The ratio of two medians of samples that were not taken in the same rounds: by bootstrap over both sides, or, where
/// there are few samples, from the smallest to the largest ratio of two of them.
pub(super) fn ratio_of_medians(of: &[f64], to: &[f64]) -> Option<Estimate> {
    if of.is_empty() || to.is_empty() {
        return None;
    }
    let median = |samples: &[f64]| quantile(samples.to_vec(), 0.5);
    let point = median(of) / median(to);
    if of.len().min(to.len()) < ENOUGH {
        let ends = |samples: &[f64]| (quantile(samples.to_vec(), 0.0), quantile(samples.to_vec(), 1.0));
        let ((of_least, of_most), (to_least, to_most)) = (ends(of), ends(to));
        return Some(Estimate { point, low: of_least / to_most, high: of_most / to_least });
    }
    let mut random = SEED;
    let mut again = |samples: &[f64]| {
        let drawn = samples.iter().map(|_| samples[(next(&mut random) % samples.len() as u64) as usize]);
        quantile(drawn.collect(), 0.5)
    };
    let ratios: Vec<f64> = (0..RESAMPLES).map(|_| again(of) / again(to)).collect();
    Some(Estimate { point, low: quantile(ratios.clone(), 0.025), high: quantile(ratios, 0.975) })
}

/// The mean of the middle half: a round that something else disturbed is not in it.
fn middle(samples: &mut [f64]) -> f64 {
    samples.sort_by(f64::total_cmp);
    let quarter = samples.len() / 4;
    let half = &samples[quarter..samples.len() - quarter];
    half.iter().sum::<f64>() / half.len() as f64
}

/// SplitMix64: any generator will do, and one that never changes keeps reports comparable.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(SEED);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_samples() {
        let samples = || (1..=100).rev().map(f64::from).collect::<Vec<_>>();
        assert_eq!(quantile(samples(), 0.5), 50.0);
        assert_eq!(quantile(samples(), 0.99), 99.0);
        assert_eq!(quantile(vec![7.0], 0.99), 7.0);
        assert!(quantile(Vec::new(), 0.5).is_nan());
    }

    #[test]
    fn an_interval_holds_the_middle_and_ignores_disturbed_rounds() {
        let mut samples: Vec<f64> = (0..40).map(|number| 0.99 + f64::from(number % 5) * 0.005).collect();
        let quiet = estimate(&samples);
        assert!(quiet.low < quiet.point && quiet.point < quiet.high, "{quiet:?}");
        assert!((quiet.point - 1.0).abs() < 1e-9, "{quiet:?}");
        assert!(quiet.high - quiet.low < 0.01, "{quiet:?}");
        samples.extend([0.2, 7.0]);
        assert!((estimate(&samples).point - 1.0).abs() < 0.002);
        assert_eq!(estimate(&samples), estimate(&samples), "the same every time");
    }

    #[test]
    fn quantiles_are_all_there_or_none() {
        assert_eq!(quantiles((1..=1000).rev().map(f64::from).collect()), [500.0, 900.0, 990.0, 999.0]);
        assert!(quantiles(Vec::new()).is_empty());
    }

    #[test]
    fn few_samples_have_the_interval_of_all_their_ratios() {
        let ratio = |of: &[f64], to: &[f64]| ratio_of_medians(of, to).unwrap();
        assert_eq!(ratio(&[6.0, 8.0], &[2.0]), Estimate { point: 3.0, low: 3.0, high: 4.0 });
        let many = ratio(&[6.0, 6.1, 6.2, 6.3, 6.4], &[2.0, 2.0, 2.0, 2.0, 2.1]);
        assert!(many.low > 2.9 && many.low <= many.point && many.point <= many.high, "{many:?}");
        assert!(ratio_of_medians(&[], &[1.0]).is_none());
        assert_eq!(Estimate { point: 119.12, low: 90.4, high: 130.0 }.to_string(), "119 (90 to 130)");
    }

    #[test]
    fn no_samples_are_no_number() {
        assert!(estimate(&[]).point.is_nan());
        assert_eq!(estimate(&[0.5]), Estimate { point: 0.5, low: 0.5, high: 0.5 });
    }
}
