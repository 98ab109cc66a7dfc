//! Medians of paired differences, and how far they can be trusted.

/// A median and the interval that holds the true one in 95 of 100 cases (sign test: no assumption
/// about the noise but that it is the same for both of a pair).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Median {
    pub value: f64,
    pub interval: [f64; 2],
}

pub fn median(samples: &[f64]) -> Median {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let n = sorted.len();
    assert!(n > 0, "nothing was measured");
    let value = f64::midpoint(sorted[(n - 1) / 2], sorted[n / 2]);
    let cut = outside(n);
    Median {
        value,
        interval: [sorted[cut], sorted[n - 1 - cut]],
    }
}

/// How many of `n` sorted samples lie outside of the interval on each side: the largest number that
/// a fair coin stays at or below with at most 2.5 %.
fn outside(n: usize) -> usize {
    let mut sum = 0.0;
    let mut cut = 0;
    // Binomial(n, 1/2), from its lower end.
    let mut term = 0.5_f64.powi(i32::try_from(n).unwrap_or(i32::MAX));
    for k in 0..n / 2 {
        sum += term;
        if sum > 0.025 {
            break;
        }
        cut = k;
        term *= (n - k) as f64 / (k + 1) as f64;
    }
    cut
}

/// The share `p` of the samples is at most this.
pub fn percentile(samples: &[f64], p: f64) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = (p * sorted.len() as f64).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // By the tables: of 25, the 8th from either end; of 6, the ends; of 5, no such interval.
        assert_eq!(
            [outside(25), outside(9), outside(6), outside(5)],
            [7, 1, 0, 0]
        );
        let samples: Vec<f64> = (1..=25).map(f64::from).collect();
        let found = median(&samples);
        assert_eq!((found.value, found.interval), (13.0, [8.0, 18.0]));
    }

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&samples, 0.99), 99.0);
        assert_eq!(percentile(&samples, 1.0), 100.0);
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
    }
}
