//! From samples to the verdict.
//!
//! Invariant: percentiles are of single requests, by nearest rank, over all rounds of a way; the same
//! clients count before and after a fault, and those of a proxy that was lost itself in neither.

use std::{collections::BTreeMap, fmt::Write as _, time::SystemTime};

use super::{How, fault::Hit, load::Sample, timeline::Event};
use crate::report::at_rank;

/// What other shards' requests may take longer, 99 of 100 times.
const OTHERS_US_MAX: f64 = 1_000.0;
/// A request that began right at the fault may have been served before it took hold.
const AT_THE_FAULT_US: u64 = 2_000;
/// Of the time since a fault, to see when others notice it.
const SECONDS_SHOWN: usize = 5;
/// What a write is answered that was on its way when its primary was lost.
const UNKNOWN: &str = "unknown";

/// One failover.
#[derive(Debug, Clone)]
pub(super) struct Round {
    pub(super) how: How,
    /// Whose clients do not count, since their proxy was hit itself.
    pub(super) proxy_lost: Option<usize>,
    /// Shards that lost their primaries.
    pub(super) victims: Vec<usize>,
    pub(super) hit: Hit,
    /// Begin of the window without a fault, which ends with the fault.
    pub(super) calm_us: u64,
    /// End of the window with it.
    pub(super) window_end_us: u64,
    pub(super) healed_ms: f64,
    /// Of each victim, from the fault to the first acknowledged write of a request made since.
    pub(super) first_ms: Vec<Option<f64>>,
    /// The same at each proxy, of any victim.
    pub(super) by_proxy_ms: BTreeMap<usize, f64>,
    /// Latencies of the other shards' requests, in microseconds: before, and since.
    pub(super) before: Vec<f64>,
    pub(super) since: Vec<f64>,
    /// For each of `since`, how many whole seconds after the fault it was sent.
    pub(super) seconds: Vec<usize>,
    /// What the victims' clients were told.
    pub(super) errors: BTreeMap<String, usize>,
    /// What all other clients were told.
    pub(super) others_errors: BTreeMap<String, usize>,
    pub(super) events: Vec<Event>,
}

impl Default for Round {
    fn default() -> Self {
        Self {
            how: How::Kill,
            proxy_lost: None,
            victims: Vec::new(),
            hit: Hit {
                from_us: 0,
                done_us: 0,
                wall: SystemTime::UNIX_EPOCH,
            },
            calm_us: 0,
            window_end_us: 0,
            healed_ms: 0.0,
            first_ms: Vec::new(),
            by_proxy_ms: BTreeMap::new(),
            before: Vec::new(),
            since: Vec::new(),
            seconds: Vec::new(),
            errors: BTreeMap::new(),
            others_errors: BTreeMap::new(),
            events: Vec::new(),
        }
    }
}

impl Round {
    /// Takes in what the clients noted from the begin of the first window on.
    pub(super) fn count(&mut self, samples: &[Sample]) {
        self.first_ms = vec![None; self.victims.len()];
        for sample in samples {
            if Some(sample.proxy) == self.proxy_lost {
                continue;
            }
            match self.victims.iter().position(|v| *v == sample.shard) {
                Some(at) => self.count_victim(at, sample),
                None => self.count_other(sample),
            }
        }
    }

    fn count_victim(&mut self, at: usize, sample: &Sample) {
        if let Some(error) = &sample.error {
            *self.errors.entry(error.clone()).or_default() += 1;
            return;
        }
        if !sample.is_write || sample.from_us < self.hit.done_us + AT_THE_FAULT_US {
            return;
        }
        let took_ms = (sample.to_us - self.hit.from_us) as f64 / 1e3;
        let first = &mut self.first_ms[at];
        *first = Some(first.map_or(took_ms, |known| known.min(took_ms)));
        let known = self.by_proxy_ms.entry(sample.proxy).or_insert(took_ms);
        *known = known.min(took_ms);
    }

    fn count_other(&mut self, sample: &Sample) {
        if let Some(error) = &sample.error {
            *self.others_errors.entry(error.clone()).or_default() += 1;
            return;
        }
        let took = (sample.to_us - sample.from_us) as f64;
        let from = sample.from_us;
        if (self.calm_us..self.hit.from_us).contains(&from) {
            self.before.push(took);
        } else if (self.hit.from_us..self.window_end_us).contains(&from) {
            self.since.push(took);
            let second = (from - self.hit.from_us) / 1_000_000;
            self.seconds
                .push(usize::try_from(second).unwrap_or(usize::MAX));
        }
    }

    /// One round for a person who looks where time goes.
    pub(super) fn line(&self, number: usize) -> String {
        let firsts: Vec<String> = self.first_ms.iter().map(|f| ms(*f)).collect();
        let proxies = self.by_proxy_ms.iter();
        let proxies: Vec<String> = proxies.map(|(p, at)| format!("p{p} {at:.0}")).collect();
        let (before, since) = (Spread::of(&self.before), Spread::of(&self.since));
        let mut line = format!(
            "{} {number}: shards {:?}: first write after {} ms ({}); others' p99 {:.2} -> {:.2} ms; \
             whole after {:.0} ms more",
            self.how.name(),
            self.victims,
            firsts.join(", "),
            proxies.join(", "),
            before.p99 / 1e3,
            since.p99 / 1e3,
            self.healed_ms,
        );
        for event in &self.events {
            let shard = event.shard.rsplit('-').next().unwrap_or_default();
            let _ = write!(line, "\n    {:+8.0} ms {shard} {}", event.at_ms, event.step);
            if !event.message.is_empty() {
                let _ = write!(line, ": {}", event.message);
            }
        }
        line
    }
}

fn ms(value: Option<f64>) -> String {
    value.map_or_else(|| "none within the window".into(), |v| format!("{v:.0}"))
}

/// All rounds.
#[derive(Debug, Default)]
pub(super) struct Report {
    rounds: Vec<Round>,
    /// Rounds that could not be made.
    pub(super) failed: Vec<String>,
}

/// Percentiles by nearest rank, of whatever unit.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Spread {
    count: usize,
    p50: f64,
    p99: f64,
    max: f64,
}

impl Spread {
    fn of(values: &[f64]) -> Self {
        let mut values = values.to_vec();
        values.sort_by(f64::total_cmp);
        Self {
            count: values.len(),
            p50: at_rank(&values, 0.5),
            p99: at_rank(&values, 0.99),
            max: at_rank(&values, 1.0),
        }
    }
}

/// What is wanted of one way, and whether it was so.
#[derive(Debug, Clone, PartialEq)]
struct Verdict {
    kept: bool,
    text: String,
}

impl Report {
    pub(super) fn add(&mut self, round: Round) {
        self.rounds.push(round);
    }

    /// Whether everything that is wanted was so, and something was measured.
    pub(super) fn is_kept(&self) -> bool {
        let verdicts = self.verdicts();
        self.failed.is_empty() && !verdicts.is_empty() && verdicts.iter().all(|v| v.kept)
    }

    fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for how in How::ALL {
            let rounds: Vec<&Round> = self.rounds.iter().filter(|r| r.how == how).collect();
            if !rounds.is_empty() {
                verdicts.extend([
                    first_writes(how, &rounds),
                    others(how, &rounds),
                    others_errors(how, &rounds),
                    errors(how, &rounds),
                ]);
            }
        }
        verdicts
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::new();
        for verdict in self.verdicts() {
            let word = if verdict.kept { "kept  " } else { "BROKEN" };
            let _ = writeln!(text, "{word} {}", verdict.text);
        }
        for failed in &self.failed {
            let _ = writeln!(text, "BROKEN a round could not be made: {failed}");
        }
        text.truncate(text.trim_end().len());
        text
    }
}

fn first_writes(how: How, rounds: &[&Round]) -> Verdict {
    let all = || rounds.iter().flat_map(|r| &r.first_ms);
    let never = all().filter(|f| f.is_none()).count();
    let spread = Spread::of(&all().copied().flatten().collect::<Vec<_>>());
    let wanted_ms = how.wanted().as_secs_f64() * 1e3;
    Verdict {
        kept: never == 0 && spread.count > 0 && spread.p99 <= wanted_ms,
        text: format!(
            "{}: first write after p50 {:.0}  p99 {:.0}  max {:.0} ms (wanted: p99 <= {wanted_ms:.0}); \
             {} samples in {} rounds, {never} without a write in the window",
            how.name(),
            spread.p50,
            spread.p99,
            spread.max,
            spread.count,
            rounds.len()
        ),
    }
}

fn others(how: How, rounds: &[&Round]) -> Verdict {
    let pool = |of: fn(&Round) -> &Vec<f64>| -> Vec<f64> {
        rounds.iter().flat_map(|r| of(r)).copied().collect()
    };
    let (before, since) = (
        Spread::of(&pool(|r| &r.before)),
        Spread::of(&pool(|r| &r.since)),
    );
    let each = |r: &&Round| Spread::of(&r.since).p99 - Spread::of(&r.before).p99;
    let rounds_us = Spread::of(&rounds.iter().map(each).collect::<Vec<_>>());
    let more = since.p99 - before.p99;
    let by_second: Vec<String> = (0..SECONDS_SHOWN)
        .map(|second| {
            let at = |r: &&Round| {
                let pairs = r.since.iter().zip(&r.seconds);
                let of = pairs.filter(|(_, s)| **s == second);
                of.map(|(took, _)| *took).collect::<Vec<_>>()
            };
            let all: Vec<f64> = rounds.iter().flat_map(at).collect();
            format!("{:.2}", Spread::of(&all).p99 / 1e3)
        })
        .collect();
    Verdict {
        kept: since.count > 0 && before.count > 0 && more <= OTHERS_US_MAX,
        text: format!(
            "{}: other shards' requests: p50 {:.2} -> {:.2}, p99 {:.2} -> {:.2} ({:+.2}), max {:.1} -> \
             {:.1} ms (wanted: p99 + <= 1); a round's p99 differs by {:+.2} ms in the middle; by \
             seconds since the fault {}; {} and {} samples",
            how.name(),
            before.p50 / 1e3,
            since.p50 / 1e3,
            before.p99 / 1e3,
            since.p99 / 1e3,
            more / 1e3,
            before.max / 1e3,
            since.max / 1e3,
            rounds_us.p50 / 1e3,
            by_second.join(", "),
            before.count,
            since.count
        ),
    }
}

fn sum<'a>(
    maps: impl Iterator<Item = &'a BTreeMap<String, usize>>,
) -> (usize, BTreeMap<&'a str, usize>) {
    let mut words: BTreeMap<&str, usize> = BTreeMap::new();
    for (word, count) in maps.flatten() {
        *words.entry(word).or_default() += count;
    }
    (words.values().sum(), words)
}

fn others_errors(how: How, rounds: &[&Round]) -> Verdict {
    let (count, words) = sum(rounds.iter().map(|r| &r.others_errors));
    Verdict {
        kept: count == 0,
        text: format!(
            "{}: errors of other shards' clients: {count} (wanted: 0) {}",
            how.name(),
            shown(&words)
        ),
    }
}

fn errors(how: How, rounds: &[&Round]) -> Verdict {
    let (count, words) = sum(rounds.iter().map(|r| &r.errors));
    let unknown: usize = words
        .iter()
        .filter(|(word, _)| word.contains(UNKNOWN))
        .map(|(_, count)| count)
        .sum();
    Verdict {
        kept: count == unknown,
        text: format!(
            "{}: errors of the lost primaries' clients: {count}, {unknown} of them of unknown outcome \
             (wanted: all) {}",
            how.name(),
            shown(&words)
        ),
    }
}

fn shown(words: &BTreeMap<&str, usize>) -> String {
    words
        .iter()
        .map(|(word, count)| format!("\n         {count} x {word}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(shard: usize, from_us: u64, to_us: u64) -> Sample {
        Sample {
            shard,
            proxy: 0,
            is_write: true,
            from_us,
            to_us,
            error: None,
        }
    }

    fn round() -> Round {
        Round {
            victims: vec![0],
            hit: Hit {
                from_us: 10_000,
                done_us: 11_000,
                wall: SystemTime::UNIX_EPOCH,
            },
            window_end_us: 500_000,
            ..Round::default()
        }
    }

    #[test]
    fn a_write_that_began_before_the_fault_is_no_first_write() {
        let mut round = round();
        round.count(&[sample(0, 9_000, 30_000), sample(0, 20_000, 90_000)]);
        assert_eq!(round.first_ms, [Some(80.0)]);
        round.count(&[sample(0, 9_000, 30_000)]);
        assert_eq!(round.first_ms, [None]);
    }

    #[test]
    fn other_shards_count_before_and_since_and_not_at_a_lost_proxy() {
        let mut round = round();
        let mut lost = sample(1, 20_000, 29_000);
        lost.proxy = 2;
        round.proxy_lost = Some(2);
        round.count(&[sample(1, 5_000, 5_300), sample(1, 20_000, 20_500), lost]);
        assert_eq!((round.before, round.since), (vec![300.0], vec![500.0]));
    }

    #[test]
    fn whatever_was_not_as_wanted_breaks_the_verdict() {
        let mut good = round();
        good.count(&[
            sample(0, 20_000, 90_000),
            sample(1, 5_000, 5_300),
            sample(1, 20_000, 20_500),
        ]);
        let kept = |change: fn(&mut Round)| {
            let (mut report, mut round) = (Report::default(), good.clone());
            change(&mut round);
            report.add(round);
            report.is_kept()
        };
        assert!(kept(|_| {}));
        assert!(!Report::default().is_kept(), "nothing was measured");
        assert!(!kept(|r| r.first_ms = vec![Some(301.0)]));
        assert!(!kept(|r| r.first_ms = vec![None]));
        assert!(!kept(|r| r.since = vec![1_301.0]));
        let note = |words: &str| BTreeMap::from([(words.to_owned(), 1)]);
        assert!(kept(
            |r| r.errors = BTreeMap::from([("outcome unknown".into(), 1)])
        ));
        assert!(!kept(|r| r.errors = BTreeMap::from([("moved".into(), 1)])));
        let mut other = good.clone();
        other.others_errors = note("outcome unknown");
        let mut report = Report::default();
        report.add(other);
        assert!(!report.is_kept());
    }
}
