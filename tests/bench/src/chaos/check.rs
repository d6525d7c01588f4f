//! What must be true of a history and of the data at its end.
//!
//! Invariant: a finding is a promise that was broken whatever the clients could not know; operations
//! of unknown outcome may have happened or not, and each check allows for both.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    history::{Kind, Outcome, Record},
    linear::{self, Act, Operation, Verdict},
};

/// The data at the end, read by a client after everything was healed.
#[derive(Debug, Default)]
pub struct Finals {
    /// Lists, element by element: an element twice was executed twice.
    pub lists: BTreeMap<String, Vec<u64>>,
    /// Counters.
    pub counters: BTreeMap<String, u64>,
    /// By list: how often a script was executed for each of its ids.
    pub executed: BTreeMap<String, BTreeMap<u64, u64>>,
}

/// How much a check had to look at: a check that examined nothing has shown nothing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// Which; findings of it begin with the same word.
    pub check: &'static str,
    /// How much.
    pub examined: u64,
    /// Of what, and what is worth knowing.
    pub of: String,
}

/// What is promised for the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Promise {
    /// Acknowledged writes survive everything.
    pub durable: bool,
    /// Registers are linearizable.
    pub linear: bool,
}

/// A broken promise, or a loss that the mode allows and that is counted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Which check.
    pub check: &'static str,
    /// False for an allowed loss.
    pub broken: bool,
    /// What and where.
    pub what: String,
    /// How many.
    pub count: usize,
}

/// Names in a finding's text.
const SHOWN_MAX: usize = 5;

/// Every check over one run.
#[must_use]
pub fn judge(records: &[Record], finals: &Finals, promise: Promise) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut by_key: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in records {
        by_key.entry(&record.key).or_default().push(record);
    }
    for (key, records) in by_key {
        match records[0].kind {
            Kind::Add | Kind::Once | Kind::Block => {
                elements(key, &records, finals, promise, &mut findings);
            }
            Kind::Count => counter(key, &records, finals, promise, &mut findings),
            Kind::Set | Kind::Get => {
                if promise.linear {
                    register(key, &records, &mut findings);
                }
            }
        }
    }
    blocks(records, finals, &mut findings);
    findings
}

/// C1 and C6: what was acknowledged is there, what was refused is not, nothing is there twice.
fn elements(
    key: &str,
    records: &[&Record],
    finals: &Finals,
    promise: Promise,
    findings: &mut Vec<Finding>,
) {
    let none = Vec::new();
    let list = finals.lists.get(key).unwrap_or(&none);
    let there: BTreeSet<u64> = list.iter().copied().collect();
    let told = |outcome| {
        let of = records.iter().filter(move |r| r.outcome == outcome);
        of.map(|r| r.value).collect::<BTreeSet<u64>>()
    };
    let (acked, refused, unknown) = (
        told(Outcome::Acked),
        told(Outcome::Refused),
        told(Outcome::Unknown),
    );
    let lost: Vec<_> = acked.difference(&there).copied().collect();
    note(
        findings,
        "C1 acknowledged is lost",
        promise.durable,
        key,
        &lost,
    );
    let ghosts: Vec<_> = refused.intersection(&there).copied().collect();
    note(findings, "C1 refused is there", true, key, &ghosts);
    let strange: Vec<_> = there
        .iter()
        .filter(|v| !acked.contains(v) && !refused.contains(v) && !unknown.contains(v))
        .copied()
        .collect();
    note(findings, "C1 nobody wrote it", true, key, &strange);
    let mut seen = BTreeSet::new();
    let mut twice: Vec<_> = list.iter().filter(|v| !seen.insert(**v)).copied().collect();
    let scripts = finals.executed.get(key).into_iter().flatten();
    twice.extend(scripts.filter(|(_, times)| **times > 1).map(|(id, _)| *id));
    note(findings, "C6 executed twice", true, key, &twice);
}

/// C2: between what was acknowledged and that with all that is unknown.
fn counter(
    key: &str,
    records: &[&Record],
    finals: &Finals,
    promise: Promise,
    findings: &mut Vec<Finding>,
) {
    let told = |outcome| records.iter().filter(|r| r.outcome == outcome).count() as u64;
    let total = finals.counters.get(key).copied().unwrap_or_default();
    let (acked, unknown) = (told(Outcome::Acked), told(Outcome::Unknown));
    if total < acked {
        findings.push(Finding {
            check: "C2 counter below what was acknowledged",
            broken: promise.durable,
            what: format!("{key}: {total} of {acked}"),
            count: usize::try_from(acked - total).unwrap_or(usize::MAX),
        });
    }
    if total > acked + unknown {
        findings.push(Finding {
            check: "C2 counter above all that was asked",
            broken: true,
            what: format!("{key}: {total}, acknowledged {acked}, unknown {unknown}"),
            count: usize::try_from(total - acked - unknown).unwrap_or(usize::MAX),
        });
    }
}

/// C3: the register behaves as one.
fn register(key: &str, records: &[&Record], findings: &mut Vec<Finding>) {
    let operations: Vec<Operation> = records
        .iter()
        .filter(|r| r.outcome != Outcome::Refused)
        .map(|r| Operation {
            act: match r.kind {
                Kind::Get => Act::Read(r.value),
                _ => Act::Write(r.value),
            },
            from_us: r.from_us,
            to_us: (r.outcome == Outcome::Acked).then_some(r.to_us),
        })
        .collect();
    let (broken, what) = match linear::check(&operations) {
        Verdict::Linear => return,
        Verdict::Broken(front) => (true, format!("{key}: no order beyond {front:?}")),
        Verdict::TooHard => (false, format!("{key}: too concurrent to decide")),
    };
    findings.push(Finding {
        check: "C3 not linearizable",
        broken,
        what,
        count: 1,
    });
}

/// C4: a transaction's two lists have the same elements, whatever its outcome.
fn blocks(records: &[Record], finals: &Finals, findings: &mut Vec<Finding>) {
    let keys: BTreeSet<&str> = records
        .iter()
        .filter(|r| r.kind == Kind::Block)
        .map(|r| r.key.as_str())
        .collect();
    for key in keys {
        let list = |name: &str| {
            let found = finals.lists.get(name);
            found
                .into_iter()
                .flatten()
                .copied()
                .collect::<BTreeSet<u64>>()
        };
        let (one, other) = (list(key), list(&twin(key)));
        let torn: Vec<_> = one.symmetric_difference(&other).copied().collect();
        note(findings, "C4 transaction torn", true, key, &torn);
    }
}

/// How much each of these checks had to look at.
#[must_use]
pub fn checked(records: &[Record], finals: &Finals, promise: Promise) -> Vec<Checked> {
    let told = |kinds: &[Kind], outcome: Option<Outcome>| {
        let of = records.iter().filter(|r| kinds.contains(&r.kind));
        of.filter(|r| outcome.is_none_or(|o| o == r.outcome))
            .count() as u64
    };
    let line = |check, examined, of: &str| Checked {
        check,
        examined,
        of: of.to_owned(),
    };
    let lists = [Kind::Add, Kind::Once, Kind::Block];
    let elements = finals.lists.values().map(Vec::len).sum::<usize>() as u64;
    let scripts = finals.executed.values().map(BTreeMap::len).sum::<usize>();
    let registers = [Kind::Set, Kind::Get];
    let mut all = vec![
        line(
            "C1 elements",
            told(&lists, Some(Outcome::Acked)),
            "acknowledged elements",
        ),
        line(
            "C2 counters",
            told(&[Kind::Count], Some(Outcome::Acked)),
            "acknowledged counts",
        ),
        line(
            "C4 transactions",
            told(&[Kind::Block], None),
            "transactions",
        ),
        line(
            "C6 once",
            elements,
            &format!("elements of lists, and {scripts} ids of scripts"),
        ),
    ];
    if promise.linear {
        let of = "operations on registers";
        all.insert(2, line("C3 registers", told(&registers, None), of));
    }
    all
}

/// A line for each check, and whether its promise was kept. A check that examined nothing has shown
/// nothing, so it fails.
#[must_use]
pub fn verdicts(findings: &[Finding], checked: &[Checked]) -> Vec<(String, bool)> {
    let line = |checked: &Checked| {
        let number = |check: &'static str| check.split(' ').next();
        let of = findings
            .iter()
            .filter(|f| number(f.check) == number(checked.check));
        let broken = of.filter(|f| f.broken).count();
        let word = match (broken, checked.examined) {
            (0, 0) => "BROKEN, it had nothing to examine",
            (0, _) => "kept",
            _ => "BROKEN",
        };
        let (check, examined, of) = (checked.check, checked.examined, &checked.of);
        (format!("{check}: {word}: {examined} {of}"), word == "kept")
    };
    let mut lines: Vec<_> = checked.iter().map(line).collect();
    lines.sort_by_key(|(line, _)| {
        let digits = line.trim_start_matches('C').split(' ').next();
        digits.and_then(|d| d.parse::<u32>().ok())
    });
    lines
}

/// Where the scripts that write to `key` count how often they were executed for an id.
#[must_use]
pub fn tally(key: &str) -> String {
    format!("{key}:tally")
}

/// The second list of a transaction that writes `key` and this one.
#[must_use]
pub fn twin(key: &str) -> String {
    format!("{key}:twin")
}

fn note(findings: &mut Vec<Finding>, check: &'static str, broken: bool, key: &str, values: &[u64]) {
    if values.is_empty() {
        return;
    }
    let shown: Vec<String> = values.iter().take(SHOWN_MAX).map(u64::to_string).collect();
    findings.push(Finding {
        check,
        broken,
        what: format!(
            "{key}: {} of them, such as {}",
            values.len(),
            shown.join(", ")
        ),
        count: values.len(),
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const DURABLE: Promise = Promise {
        durable: true,
        linear: true,
    };

    fn record(kind: Kind, value: u64, outcome: Outcome) -> Record {
        Record {
            client: 0,
            kind,
            key: "k".into(),
            value,
            place: 0,
            from_us: value * 10,
            to_us: value * 10 + 5,
            outcome,
            error: None,
        }
    }

    fn finals(list: &[u64], counter: u64) -> Finals {
        let mut finals = Finals::default();
        finals.lists.insert("k".into(), list.to_vec());
        finals.lists.insert(twin("k"), list.to_vec());
        finals.counters.insert("k".into(), counter);
        finals
    }

    fn checks(records: &[Record], finals: &Finals, promise: Promise) -> Vec<(&'static str, bool)> {
        let found = judge(records, finals, promise);
        found.iter().map(|f| (f.check, f.broken)).collect()
    }

    #[test]
    fn what_is_unknown_may_be_there_or_not() {
        let records = [
            record(Kind::Add, 1, Outcome::Acked),
            record(Kind::Add, 2, Outcome::Unknown),
            record(Kind::Add, 3, Outcome::Refused),
        ];
        assert!(checks(&records, &finals(&[1], 0), DURABLE).is_empty());
        assert!(checks(&records, &finals(&[1, 2], 0), DURABLE).is_empty());
    }

    #[test]
    fn losses_ghosts_and_repetitions_are_found() {
        let records = [
            record(Kind::Add, 1, Outcome::Acked),
            record(Kind::Add, 3, Outcome::Refused),
        ];
        let found = checks(&records, &finals(&[3, 3, 9], 0), DURABLE);
        let all = [
            ("C1 acknowledged is lost", true),
            ("C1 refused is there", true),
            ("C1 nobody wrote it", true),
            ("C6 executed twice", true),
        ];
        assert_eq!(found, all);
        let asynchronous = Promise {
            durable: false,
            linear: false,
        };
        let found = checks(&records, &finals(&[], 0), asynchronous);
        assert_eq!(found, [("C1 acknowledged is lost", false)]);
    }

    #[test]
    fn a_script_that_was_executed_twice_is_found_by_its_tally() {
        let records = [record(Kind::Once, 1, Outcome::Acked)];
        let mut data = finals(&[1], 0);
        data.executed.insert("k".into(), [(1, 1)].into());
        assert!(checks(&records, &data, DURABLE).is_empty());
        data.executed.insert("k".into(), [(1, 2)].into());
        assert_eq!(
            checks(&records, &data, DURABLE),
            [("C6 executed twice", true)]
        );
    }

    #[test]
    fn what_was_looked_at_is_counted_and_an_empty_history_counts_nothing() {
        let records = [
            record(Kind::Block, 1, Outcome::Acked),
            record(Kind::Add, 2, Outcome::Unknown),
            record(Kind::Set, 3, Outcome::Acked),
        ];
        let counts = |records: &[Record], finals: &Finals, promise| -> Vec<u64> {
            let all = checked(records, finals, promise);
            all.iter().map(|c| c.examined).collect()
        };
        assert_eq!(counts(&records, &finals(&[1], 0), DURABLE), [1, 0, 1, 1, 2]);
        let nothing = counts(&[], &Finals::default(), DURABLE);
        assert_eq!(nothing, [0; 5]);
    }

    #[test]
    fn a_check_that_examined_nothing_fails_and_so_does_one_that_found_something() {
        let checked = |check, examined| Checked {
            check,
            examined,
            of: "things".into(),
        };
        let finding = |check, broken| Finding {
            check,
            broken,
            what: String::new(),
            count: 1,
        };
        let findings = [finding("C10 lost", true), finding("C1 lost", false)];
        let all = [checked("C10 x", 5), checked("C1 x", 5), checked("C2 x", 0)];
        let lines = verdicts(&findings, &all);
        let short: Vec<_> = lines
            .iter()
            .map(|(line, kept)| (&line[..3], *kept))
            .collect();
        assert_eq!(short, [("C1 ", true), ("C2 ", false), ("C10", false)]);
        assert!(lines[1].0.contains("nothing to examine"));
    }

    #[test]
    fn a_counter_is_between_what_was_acknowledged_and_what_was_asked() {
        let records = [
            record(Kind::Count, 1, Outcome::Acked),
            record(Kind::Count, 1, Outcome::Unknown),
        ];
        for (total, findings) in [(0, 1), (1, 0), (2, 0), (3, 1)] {
            let found = checks(&records, &finals(&[], total), DURABLE);
            assert_eq!(found.len(), findings, "{total}");
        }
    }

    #[test]
    fn a_torn_transaction_and_a_stale_read_are_found() {
        let torn = [record(Kind::Block, 1, Outcome::Unknown)];
        let mut data = finals(&[1], 0);
        data.lists.insert(twin("k"), Vec::new());
        assert_eq!(
            checks(&torn, &data, DURABLE),
            [("C4 transaction torn", true)]
        );
        let stale = [
            record(Kind::Set, 1, Outcome::Acked),
            Record {
                from_us: 100,
                to_us: 110,
                ..record(Kind::Get, 0, Outcome::Acked)
            },
        ];
        let found = checks(&stale, &finals(&[], 0), DURABLE);
        assert_eq!(found, [("C3 not linearizable", true)]);
    }
}
