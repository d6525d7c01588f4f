//! C9: requests that were held are answered in their order, and in peace, planned moves included, not
//! later than a hold may last.
//!
//! Invariant: an answer counts by its own shard only; what an unplanned fault held is measured and
//! printed, and held against nobody.

use std::collections::BTreeMap;

use super::{
    check::{Checked, Finals, Finding},
    history::{Kind, Outcome, Record},
    timeline::Timeline,
};

/// A planned hold ends by itself after a second; the rest is for a machine that is short of
/// processors, on which a run's own processes are scheduled late.
const HELD_MAX_US: u64 = 3_000_000;
/// What a fault leaves when all nodes are well again: proxies that have yet to connect.
const AFTERMATH_US: u64 = 2_000_000;
/// Shorter ones are the clients' pace.
const NOTABLE_US: u64 = 100_000;
/// Of findings of one sort.
const SHOWN_MAX: usize = 5;

/// A time without an answer of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Gap {
    shard: String,
    from_us: u64,
    to_us: u64,
}

/// Whether clients were answered in order and in time.
pub fn judge(
    records: &[Record],
    finals: &Finals,
    timeline: &Timeline,
    durable: bool,
    shard_of: impl Fn(&str) -> String,
) -> (Vec<Finding>, Checked) {
    let mut findings = Vec::new();
    let placed = order(records, finals, durable, &mut findings);
    in_time(records, timeline, &mut findings);
    let gaps = gaps(records, shard_of);
    let silent = gaps.iter().filter(|gap| {
        gap.to_us - gap.from_us > HELD_MAX_US
            && !timeline.is_troubled(gap.from_us, gap.to_us, AFTERMATH_US)
    });
    let said = silent.map(|gap| {
        let ms = (gap.to_us - gap.from_us) / 1_000;
        format!("{} for {ms} ms from {} us on", gap.shard, gap.from_us)
    });
    note(&mut findings, "C9 shard silent in peace", said.collect());
    let longest = longest(&gaps, timeline);
    let longest: Vec<String> = longest
        .iter()
        .map(|(kind, us)| format!("{kind} {} ms", us / 1_000))
        .collect();
    let answered = records.iter().filter(|r| r.outcome == Outcome::Acked);
    let checked = Checked {
        check: "C9 holds",
        examined: answered.count() as u64,
        of: format!(
            "answers, {placed} of them by their place; a shard's longest silence by fault: {}",
            longest.join(", ")
        ),
    };
    (findings, checked)
}

/// A client's elements are in its list in the order in which it asked. Where nothing may be lost, each
/// is at the place that its own answer named. Returns how many such places were looked at.
fn order(records: &[Record], finals: &Finals, durable: bool, findings: &mut Vec<Finding>) -> u64 {
    let mut acked: BTreeMap<&str, BTreeMap<u64, u64>> = BTreeMap::new();
    let of = |r: &&Record| r.kind == Kind::Add && r.outcome == Outcome::Acked;
    for record in records.iter().filter(of) {
        let places = acked.entry(&record.key).or_default();
        places.insert(record.value, record.place);
    }
    let (mut placed, mut turned, mut elsewhere) = (0, Vec::new(), Vec::new());
    for (key, places) in acked {
        let Some(list) = finals.lists.get(key) else {
            continue;
        };
        let known: Vec<u64> = list
            .iter()
            .copied()
            .filter(|value| places.contains_key(value))
            .collect();
        let before = |pair: &&[u64]| pair[0] > pair[1];
        if let Some(pair) = known.windows(2).find(before) {
            turned.push(format!("{key}: {} before {}", pair[0], pair[1]));
        }
        if !durable {
            continue;
        }
        for (value, place) in places.into_iter().filter(|(_, place)| *place > 0) {
            placed += 1;
            let there = usize::try_from(place - 1).ok().and_then(|at| list.get(at));
            if there != Some(&value) {
                elsewhere.push(format!("{key}: {value} was answered {place}: {there:?}"));
            }
        }
    }
    note(findings, "C9 executed out of order", turned);
    note(findings, "C9 answered out of order", elsewhere);
    placed
}

/// In peace nobody waits for longer than a hold.
fn in_time(records: &[Record], timeline: &Timeline, findings: &mut Vec<Finding>) {
    let late = records.iter().filter(|r| {
        r.to_us - r.from_us > HELD_MAX_US && !timeline.is_troubled(r.from_us, r.to_us, AFTERMATH_US)
    });
    let said = late.map(|r| {
        let ms = (r.to_us - r.from_us) / 1_000;
        format!("client {} for {ms} ms from {} us on", r.client, r.from_us)
    });
    note(findings, "C9 held too long in peace", said.collect());
}

fn gaps(records: &[Record], shard_of: impl Fn(&str) -> String) -> Vec<Gap> {
    let mut shards: BTreeMap<&str, String> = BTreeMap::new();
    let mut answers: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for record in records.iter().filter(|r| r.outcome == Outcome::Acked) {
        let shard = shards
            .entry(&record.key)
            .or_insert_with(|| shard_of(&record.key));
        match answers.get_mut(shard.as_str()) {
            Some(times) => times.push(record.to_us),
            None => drop(answers.insert(shard.clone(), vec![record.to_us])),
        }
    }
    let mut gaps = Vec::new();
    for (shard, mut times) in answers {
        times.sort_unstable();
        let notable = |pair: &&[u64]| pair[1] - pair[0] > NOTABLE_US;
        gaps.extend(times.windows(2).filter(notable).map(|pair| Gap {
            shard: shard.clone(),
            from_us: pair[0],
            to_us: pair[1],
        }));
    }
    gaps
}

/// By kind of fault; "peace" is what none was on in.
fn longest(gaps: &[Gap], timeline: &Timeline) -> BTreeMap<String, u64> {
    let mut longest = BTreeMap::new();
    for gap in gaps {
        let on = |w: &&super::timeline::Window| {
            w.from_us <= gap.to_us && gap.from_us <= w.well_us.saturating_add(AFTERMATH_US)
        };
        let kind = timeline.windows().iter().find(on);
        let kind = kind.map_or("peace", |window| window.kind.as_str());
        let known: &mut u64 = longest.entry(kind.to_owned()).or_default();
        *known = (*known).max(gap.to_us - gap.from_us);
    }
    longest
}

fn note(findings: &mut Vec<Finding>, check: &'static str, said: Vec<String>) {
    if said.is_empty() {
        return;
    }
    let shown: Vec<_> = said.iter().take(SHOWN_MAX).map(String::as_str).collect();
    findings.push(Finding {
        check,
        broken: true,
        what: format!("{} of them, such as {}", said.len(), shown.join("; ")),
        count: said.len(),
    });
}

#[cfg(test)]
mod tests {
    use super::{super::timeline::Window, *};

    const SECOND: u64 = 1_000_000;

    fn added(value: u64, place: u64, from_us: u64, to_us: u64) -> Record {
        Record {
            client: 5,
            kind: Kind::Add,
            key: "add-5-0".into(),
            value,
            place,
            from_us,
            to_us,
            outcome: Outcome::Acked,
            error: None,
        }
    }

    fn finals(list: &[u64]) -> Finals {
        let mut finals = Finals::default();
        finals.lists.insert("add-5-0".into(), list.to_vec());
        finals
    }

    fn found(
        records: &[Record],
        list: &[u64],
        line: &Timeline,
        durable: bool,
    ) -> Vec<&'static str> {
        let (findings, checked) = judge(records, &finals(list), line, durable, |_| "s-1".into());
        assert_eq!(checked.examined, records.len() as u64);
        findings.into_iter().map(|f| f.check).collect()
    }

    #[test]
    fn answers_of_one_burst_belong_to_their_requests() {
        let peace = Timeline::default();
        let burst = |places: [u64; 3]| -> Vec<_> {
            let of = places.into_iter().zip(1..);
            of.map(|(place, value)| added(value, place, 0, 10))
                .collect()
        };
        assert!(found(&burst([1, 2, 3]), &[1, 2, 3], &peace, true).is_empty());
        let mixed = found(&burst([2, 1, 3]), &[1, 2, 3], &peace, true);
        assert_eq!(mixed, ["C9 answered out of order"]);
        let lost = found(&burst([1, 2, 3]), &[1, 3], &peace, false);
        assert!(lost.is_empty(), "asynchronous mode may lose");
    }

    #[test]
    fn what_was_asked_later_is_not_executed_before() {
        let records = [added(1, 0, 0, 10), added(2, 0, 20, 30)];
        let found = found(&records, &[2, 1], &Timeline::default(), true);
        assert_eq!(found, ["C9 executed out of order"]);
    }

    #[test]
    fn only_an_unplanned_fault_excuses_a_long_hold() {
        let records = [
            added(1, 1, 0, 10),
            added(2, 2, 10 * SECOND, 14 * SECOND),
            added(3, 3, 14 * SECOND, 14 * SECOND + 10),
        ];
        let line = |planned| {
            Timeline::of(vec![Window {
                kind: "Move".into(),
                planned,
                from_us: SECOND,
                well_us: 13 * SECOND,
            }])
        };
        let list = [1, 2, 3];
        assert_eq!(
            found(&records, &list, &line(true), true),
            ["C9 held too long in peace", "C9 shard silent in peace"]
        );
        assert!(found(&records, &list, &line(false), true).is_empty());
        let (_, checked) = judge(&records, &finals(&list), &line(false), true, |_| "s".into());
        assert!(checked.of.contains("Move 13999 ms"), "{}", checked.of);
    }
}
