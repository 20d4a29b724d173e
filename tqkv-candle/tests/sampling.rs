//! Sampling against distributions computed by hand.

use tqkv_candle::{Error, GenerateOptions, Sampler};

fn options() -> GenerateOptions {
    GenerateOptions { temperature: 1.0, ..GenerateOptions::default() }
}

/// Logits of tokens with these probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln() + 3.0).collect()
}

fn close(options: &GenerateOptions, seen: &[u32], logits: &[f32], expected: &[(u32, f64)]) {
    let mut sampler = Sampler::new(options).unwrap();
    sampler.see(seen);
    let got = sampler.distribution(logits).unwrap();
    let near = |(g, e): (&(u32, f64), &(u32, f64))| g.0 == e.0 && (g.1 - e.1).abs() < 1e-6;
    assert!(got.len() == expected.len() && got.iter().zip(expected).all(near), "{options:?}: {got:?}");
}

const P: [f32; 5] = [0.1, 0.4, 0.05, 0.25, 0.2];

#[test]
fn probabilities_are_those_computed_by_hand() {
    let given = |options: GenerateOptions, expected: &[(u32, f64)]| close(&options, &[], &logits(&P), expected);
    given(options(), &[(0, 0.1), (1, 0.4), (2, 0.05), (3, 0.25), (4, 0.2)]);
    given(GenerateOptions { temperature: 0.0, ..options() }, &[(1, 1.0)]);
    // Squares: 0.01, 0.16, 0.0025, 0.0625, 0.04, in all 0.275.
    let squared = [(0, 0.01), (1, 0.16), (2, 0.0025), (3, 0.0625), (4, 0.04)].map(|(t, p)| (t, p / 0.275));
    given(GenerateOptions { temperature: 0.5, ..options() }, &squared);
    given(GenerateOptions { top_k: 2, ..options() }, &[(1, 0.4 / 0.65), (3, 0.25 / 0.65)]);
    given(GenerateOptions { top_k: 1, ..options() }, &[(1, 1.0)]);
    given(GenerateOptions { top_k: 9, ..options() }, &[(0, 0.1), (1, 0.4), (2, 0.05), (3, 0.25), (4, 0.2)]);
    // 0.4 is not enough for 0.6, 0.65 is.
    given(GenerateOptions { top_p: 0.6, ..options() }, &[(1, 0.4 / 0.65), (3, 0.25 / 0.65)]);
    given(GenerateOptions { top_p: 0.66, ..options() }, &[(1, 0.4 / 0.85), (3, 0.25 / 0.85), (4, 0.2 / 0.85)]);
    given(GenerateOptions { top_p: 1e-9, ..options() }, &[(1, 1.0)]);
    // At least half as likely as the best.
    given(GenerateOptions { min_p: 0.49, ..options() }, &[(1, 0.4 / 0.85), (3, 0.25 / 0.85), (4, 0.2 / 0.85)]);
    given(GenerateOptions { min_p: 0.51, ..options() }, &[(1, 0.4 / 0.65), (3, 0.25 / 0.65)]);
    given(GenerateOptions { min_p: 1.0, ..options() }, &[(1, 1.0)]);
    // `top_p` is of what `top_k` leaves: of 0.4, 0.25 and 0.2 the first two have 0.76.
    given(GenerateOptions { top_k: 3, top_p: 0.75, ..options() }, &[(1, 0.4 / 0.65), (3, 0.25 / 0.65)]);
    given(GenerateOptions { top_k: 4, top_p: 0.9, min_p: 0.6, ..options() }, &[(1, 0.4 / 0.65), (3, 0.25 / 0.65)]);
}

#[test]
fn tokens_that_were_there_are_made_less_likely() {
    let penalty = GenerateOptions { repetition_penalty: 2.0, ..options() };
    // 3, -1, 2 become 1.5, -2, 2.
    let sum: f64 = [1.5f64, -2.0, 2.0].map(f64::exp).iter().sum();
    let expected = [(0, 1.5f64.exp() / sum), (1, (-2f64).exp() / sum), (2, 2f64.exp() / sum)];
    close(&penalty, &[0, 1, 0, 77], &[3.0, -1.0, 2.0], &expected);
    close(&GenerateOptions { temperature: 0.0, ..penalty }, &[0], &[3.0, -1.0, 2.0], &[(2, 1.0)]);
    close(&GenerateOptions { temperature: 0.0, ..options() }, &[0], &[3.0, -1.0, 2.0], &[(0, 1.0)]);
}

#[test]
fn equals_are_taken_in_order() {
    close(&GenerateOptions { temperature: 0.0, ..options() }, &[], &[0.5, 1.0, 1.0], &[(1, 1.0)]);
    close(&GenerateOptions { top_k: 2, ..options() }, &[], &[1.0; 4], &[(0, 0.5), (1, 0.5)]);
    close(&GenerateOptions { top_p: 0.4, ..options() }, &[], &[1.0; 4], &[(0, 0.5), (1, 0.5)]);
    close(&options(), &[], &[1.0, f32::NEG_INFINITY], &[(0, 1.0), (1, 0.0)]);
}

#[test]
fn what_is_drawn_is_distributed_so() {
    let mut sampler = Sampler::new(&GenerateOptions { top_k: 3, seed: 7, ..options() }).unwrap();
    let logits = logits(&P);
    let mut counts = [0usize; 5];
    for _ in 0..20_000 {
        counts[sampler.sample(&logits).unwrap() as usize] += 1;
    }
    assert_eq!((counts[0], counts[2]), (0, 0));
    for (token, p) in [(1, 0.4 / 0.85), (3, 0.25 / 0.85), (4, 0.2 / 0.85)] {
        // Five standard deviations of a binomial distribution's share.
        let tolerance = 5.0 * (p * (1.0 - p) / 20_000.0f64).sqrt();
        assert!((counts[token] as f64 / 20_000.0 - p).abs() < tolerance, "{counts:?}");
    }
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |options: GenerateOptions, name: &str| {
        let error = Sampler::new(&options).err();
        assert!(matches!(error, Some(Error::Sampling { option, .. }) if option == name), "{options:?}: {error:?}");
    };
    for p in [0.0, -0.1, 1.1, f32::NAN, f32::INFINITY] {
        refused(GenerateOptions { top_p: p, ..options() }, "top_p");
        refused(GenerateOptions { min_p: if p == 0.0 { 2.0 } else { p }, ..options() }, "min_p");
        refused(
            GenerateOptions { repetition_penalty: if p == 1.1 { -1.1 } else { p }, ..options() },
            "repetition_penalty",
        );
    }
    assert!(matches!(
        Sampler::new(&GenerateOptions { temperature: -1.0, ..options() }),
        Err(Error::Temperature { .. })
    ));
    let sampler = Sampler::new(&options()).unwrap();
    for logits in [&[][..], &[f32::NAN, 1.0], &[f32::INFINITY, 1.0], &[f32::NEG_INFINITY; 2]] {
        assert_eq!(sampler.distribution(logits), None);
    }
}
