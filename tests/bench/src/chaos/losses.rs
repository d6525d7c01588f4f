//! C10: acknowledged writes that are missing at the end, against the tails that were captured.
//!
//! In asynchronous mode a lost primary may take acknowledged writes with it. If its process lives,
//! they must be in a captured file, or the file must say that it is incomplete; if its process ended,
//! nobody can have them, and they must be from its last seconds.
//!
//! Invariant: every missing write is accounted for by one of these three, or is an error; and what is
//! in a captured file is missing, or the file is wrong.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::Context as _;
use slotmesh_ctl::{api::Api, lost_writes::file::LostFile};
use slotmesh_proto::task::v1::{ListLostWritesRequest, LostWrites};
use tokio::time::sleep;

use super::{
    check::{Checked, Finals, Finding},
    history::{Kind, Outcome, Record},
    monitor::Life,
};

/// A primary that ends takes with it what its replicas had not read yet: milliseconds of writes, more
/// on a starved machine or while its packets are lost.
const LAST_SECONDS_US: u64 = 5_000_000;
/// From its last write to its end a primary may be frozen or cut off, for as long as a fault lasts
/// and its lease runs.
const SILENT_END_US: u64 = 15_000_000;
/// Agents report files within a second, and controllers record them.
const SETTLED: Duration = Duration::from_secs(2);
/// Attempts to read a file whose agent is just starting.
const ATTEMPTS: u32 = 5;
/// Findings in the report.
const SHOWN_MAX: usize = 5;

/// What one captured file holds.
#[derive(Clone, Debug, Default)]
pub struct Tail {
    /// Of which shard.
    pub shard: String,
    /// The lost primary's node.
    pub node: String,
    /// And its epoch.
    pub epoch: u64,
    /// The node still had all of it.
    pub complete: bool,
    /// Elements that were added to lists.
    pub elements: BTreeSet<(String, u64)>,
    /// How often each counter was counted up.
    pub counts: BTreeMap<String, u64>,
    /// Why the file could not be read as it was recorded.
    pub unreadable: Option<String>,
}

impl Tail {
    /// A command of the file.
    pub fn take(&mut self, name: &str, arguments: &[Vec<u8>]) {
        let text = |index: usize| {
            let bytes = arguments.get(index).map(Vec::as_slice).unwrap_or_default();
            String::from_utf8_lossy(bytes).into_owned()
        };
        match name {
            "RPUSH" => {
                let values = (2..arguments.len()).filter_map(|i| text(i).parse().ok());
                let key = text(1);
                self.elements.extend(values.map(|v| (key.clone(), v)));
            }
            "INCR" => *self.counts.entry(text(1)).or_default() += 1,
            _ => {}
        }
    }
}

/// Reads every file of an instance from the agents that keep them.
///
/// # Errors
/// When controllers don't answer.
pub(super) async fn tails(api: &mut Api, instance: &str) -> anyhow::Result<Vec<Tail>> {
    sleep(SETTLED).await;
    let request = ListLostWritesRequest {
        instance_id: instance.to_owned(),
    };
    let answer = api
        .call(|api| {
            let request = request.clone();
            async move { api.tasks().list_lost_writes(request).await }
        })
        .await?;
    let mut tails = Vec::new();
    for lost in &answer.lost_writes {
        let mut read = tail(lost).await;
        for _ in 1..ATTEMPTS {
            if read.is_ok() {
                break;
            }
            sleep(SETTLED).await;
            read = tail(lost).await;
        }
        tails.push(read.unwrap_or_else(|error| Tail {
            unreadable: Some(format!("{}: {error:#}", lost.file)),
            ..empty(lost)
        }));
    }
    Ok(tails)
}

fn empty(lost: &LostWrites) -> Tail {
    Tail {
        shard: lost.shard_id.clone(),
        node: lost.node_id.clone(),
        epoch: lost.epoch,
        complete: lost.complete,
        ..Tail::default()
    }
}

async fn tail(lost: &LostWrites) -> anyhow::Result<Tail> {
    let mut tail = empty(lost);
    let mut file = LostFile::open(lost).await.context("open it")?;
    while let Some(commands) = file.next().await.context("read it")? {
        for command in commands {
            tail.take(&command.name(), &command.arguments);
        }
    }
    Ok(tail)
}

/// What is known beside the history.
#[derive(Clone, Copy, Debug)]
pub struct Known<'a> {
    /// The data at the end.
    pub finals: &'a Finals,
    /// What was captured.
    pub tails: &'a [Tail],
    /// The processes, and when they ended.
    pub lives: &'a [Life],
    /// Nothing may be missing.
    pub durable: bool,
}

#[derive(Default)]
struct Count {
    examined: u64,
    missing: u64,
    captured: u64,
    incomplete: u64,
    ended: u64,
}

/// Accounts for every acknowledged write that is missing.
pub fn judge(
    records: &[Record],
    known: Known<'_>,
    shard_of: impl Fn(&str) -> String,
) -> (Vec<Finding>, Checked) {
    let captured: BTreeSet<(&str, u64)> = {
        let all = known.tails.iter().flat_map(|t| &t.elements);
        all.map(|(key, value)| (key.as_str(), *value)).collect()
    };
    let (mut findings, mut count) = (Vec::new(), Count::default());
    let there = present(known.finals);
    let mut counters: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in records {
        match record.kind {
            Kind::Add | Kind::Once | Kind::Block if record.outcome == Outcome::Acked => {
                count.examined += 1;
                let id = (record.key.as_str(), record.value);
                if there.contains(&id) {
                    continue;
                }
                count.missing += 1;
                if captured.contains(&id) {
                    count.captured += 1;
                } else if !known.excuse(record, &shard_of, &mut count) {
                    let what = format!("{} {} acknowledged at {} us", id.0, id.1, record.to_us);
                    push(&mut findings, "C10 lost and not captured", what);
                }
            }
            Kind::Count => counters.entry(&record.key).or_default().push(record),
            _ => {}
        }
    }
    for (key, records) in counters {
        known.counter(key, &records, &shard_of, &mut count, &mut findings);
    }
    for id in captured.intersection(&there) {
        let what = format!(
            "{} {} is in a file of lost writes, and in the data",
            id.0, id.1
        );
        push(&mut findings, "C10 captured and not lost", what);
    }
    for why in known.tails.iter().filter_map(|t| t.unreadable.as_ref()) {
        push(
            &mut findings,
            "C10 a captured file can't be read",
            why.clone(),
        );
    }
    if known.durable && count.missing > 0 {
        let what = format!("{} acknowledged writes", count.missing);
        push(&mut findings, "C10 lost in durable mode", what);
    }
    let files = known.tails.len();
    let incomplete = known.tails.iter().filter(|t| !t.complete).count();
    let checked = Checked {
        check: "C10 losses",
        examined: count.examined,
        of: format!(
            "acknowledged writes; {} missing: {} of them captured, {} in the {incomplete} incomplete of \
             {files} files' time, {} with a process that ended",
            count.missing, count.captured, count.incomplete, count.ended
        ),
    };
    (findings, checked)
}

fn present(finals: &Finals) -> BTreeSet<(&str, u64)> {
    let lists = finals.lists.iter();
    lists
        .flat_map(|(key, values)| values.iter().map(|v| (key.as_str(), *v)))
        .collect()
}

impl Known<'_> {
    /// Whether nobody could have captured this write, or a file says that it may not have it.
    fn excuse(
        &self,
        record: &Record,
        shard_of: &impl Fn(&str) -> String,
        count: &mut Count,
    ) -> bool {
        let shard = shard_of(&record.key);
        let lives = || self.lives.iter().filter(|l| l.shard == shard);
        let cut = self
            .tails
            .iter()
            .filter(|t| !t.complete && t.shard == shard);
        let mut cut = cut.filter_map(|t| {
            let mut of = lives().filter(|l| l.node == t.node);
            of.find_map(|l| l.epochs.get(&t.epoch))
        });
        if cut.any(|(first, last)| record.from_us <= *last && record.to_us >= *first) {
            count.incomplete += 1;
            return true;
        }
        let ended = lives().any(|life| {
            let Some(((_, last), ended)) = life.epochs.values().next_back().zip(life.ended_us)
            else {
                return false;
            };
            ended <= last + SILENT_END_US
                && record.from_us <= ended
                && record.to_us + LAST_SECONDS_US >= *last
        });
        count.ended += u64::from(ended);
        ended
    }

    fn counter(
        &self,
        key: &str,
        records: &[&Record],
        shard_of: &impl Fn(&str) -> String,
        count: &mut Count,
        findings: &mut Vec<Finding>,
    ) {
        let acked: Vec<_> = {
            let all = records.iter().filter(|r| r.outcome == Outcome::Acked);
            all.collect()
        };
        let unknown = records.iter().filter(|r| r.outcome == Outcome::Unknown);
        let asked = (acked.len() + unknown.count()) as u64;
        let total = self.finals.counters.get(key).copied().unwrap_or(0);
        let captured: u64 = self.tails.iter().filter_map(|t| t.counts.get(key)).sum();
        count.examined += acked.len() as u64;
        if total + captured > asked {
            let what = format!("{key}: {total} there, {captured} captured, {asked} asked for");
            push(findings, "C10 captured and not lost", what);
        }
        let missing = (acked.len() as u64).saturating_sub(total);
        if missing == 0 {
            return;
        }
        count.missing += missing;
        count.captured += missing.min(captured);
        let rest = missing.saturating_sub(captured);
        // Which of them are missing nobody knows: as many must have an excuse.
        let mut excused = Count::default();
        let excuses = acked
            .iter()
            .filter(|r| self.excuse(r, shard_of, &mut excused));
        let excuses = excuses.count() as u64;
        if excuses < rest {
            let what = format!("{key}: {missing} missing, {captured} captured, {excuses} excused");
            push(findings, "C10 lost and not captured", what);
        } else if excused.ended > 0 {
            count.ended += rest;
        } else {
            count.incomplete += rest;
        }
    }
}

fn push(findings: &mut Vec<Finding>, check: &'static str, what: String) {
    if findings.iter().filter(|f| f.check == check).count() < SHOWN_MAX {
        findings.push(Finding {
            check,
            broken: true,
            what,
            count: 1,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000;

    fn record(kind: Kind, key: &str, value: u64) -> Record {
        Record {
            client: 0,
            kind,
            key: key.into(),
            value,
            place: 0,
            from_us: value * SECOND,
            to_us: value * SECOND + 10,
            outcome: Outcome::Acked,
            error: None,
        }
    }

    /// The element 50 of `k` is missing, and one of two counts of `c`.
    fn lossy() -> (Vec<Record>, Finals) {
        let mut records: Vec<_> = (49..52).map(|v| record(Kind::Add, "k", v)).collect();
        records.extend((49..51).map(|v| record(Kind::Count, "c", v)));
        let mut finals = Finals::default();
        finals.lists.insert("k".into(), vec![49, 51]);
        finals.counters.insert("c".into(), 1);
        (records, finals)
    }

    fn broken(tails: &[Tail], lives: &[Life], durable: bool) -> Vec<&'static str> {
        let (records, finals) = lossy();
        let known = Known {
            finals: &finals,
            tails,
            lives,
            durable,
        };
        let (findings, checked) = judge(&records, known, |_| "s".to_owned());
        assert_eq!(checked.examined, 5);
        findings.iter().map(|f| f.check).collect()
    }

    fn tail(commands: &[&[&str]], complete: bool) -> Tail {
        let mut tail = Tail {
            shard: "s".into(),
            node: "n".into(),
            epoch: 3,
            complete,
            ..Tail::default()
        };
        for command in commands {
            let words: Vec<Vec<u8>> = command.iter().map(|w| w.as_bytes().to_vec()).collect();
            tail.take(command[0], &words);
        }
        tail
    }

    fn life(last: u64, ended: Option<u64>) -> Life {
        Life {
            shard: "s".into(),
            node: "n".into(),
            ended_us: ended.map(|e| e * SECOND),
            epochs: [(3, (SECOND, last * SECOND))].into(),
            ..Life::default()
        }
    }

    #[test]
    fn a_loss_that_nothing_accounts_for_is_found() {
        let lost = "C10 lost and not captured";
        assert_eq!(broken(&[], &[], false), [lost, lost]);
        // Neither does a process that lives on, ended long after, or long before.
        for life in [
            life(51, None),
            life(51, Some(90)),
            life(30, Some(31)),
            life(60, Some(61)),
        ] {
            assert_eq!(
                broken(&[], std::slice::from_ref(&life), false),
                [lost, lost],
                "{life:?}"
            );
        }
        // Of a file that lacks one of them.
        let half = tail(&[&["RPUSH", "k", "50"]], true);
        assert_eq!(broken(&[half], &[], false), [lost]);
    }

    #[test]
    fn a_file_accounts_for_what_it_holds_and_what_it_says_that_it_lacks() {
        let whole = tail(&[&["RPUSH", "k", "50"], &["INCR", "c"]], true);
        assert!(broken(std::slice::from_ref(&whole), &[], false).is_empty());
        assert_eq!(broken(&[whole], &[], true), ["C10 lost in durable mode"]);
        let cut = tail(&[], false);
        assert!(broken(&[cut], &[life(51, None)], false).is_empty());
    }

    #[test]
    fn a_process_that_ended_takes_its_last_seconds_with_it() {
        assert!(broken(&[], &[life(51, Some(52))], false).is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_found() {
        let (records, finals) = (Vec::new(), Finals::default());
        let known = Known {
            finals: &finals,
            tails: &[Tail {
                unreadable: Some("gone".into()),
                ..Tail::default()
            }],
            lives: &[],
            durable: false,
        };
        let (findings, checked) = judge(&records, known, |_| "s".to_owned());
        assert_eq!(findings[0].check, "C10 a captured file can't be read");
        assert_eq!(checked.examined, 0);
    }

    #[test]
    fn a_file_that_holds_what_is_there_is_found() {
        let wrong = tail(
            &[
                &["RPUSH", "k", "50"],
                &["RPUSH", "k", "51"],
                &["INCR", "c"],
                &["INCR", "c"],
            ],
            true,
        );
        let found = "C10 captured and not lost";
        assert_eq!(broken(&[wrong], &[], false), [found, found]);
    }
}
