// c·tanh(x/c). Near zero by its series, where 1 - 2/(exp(2t)+1) would cancel.
fn capped(x: f32) -> f32 {
  let c = a.softcap;
  let t = x / c;
  let t2 = t * t;
  let series = x * (1.0 + t2 * (-0.33333334 + t2 * (0.13333334 + t2 * (-0.05396825 + t2 * 0.021869488))));
  let whole = c * (1.0 - 2.0 / (exp(2.0 * min(t, 20.0)) + 1.0));
  return select(whole, series, abs(t) < 0.25);
}
