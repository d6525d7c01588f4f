//! What a proxy is, followed from its journal, proxy.json, and who lives.

use super::*;

fn process(pid: u32) -> Process {
    serde_json::from_value(serde_json::json!({ "pid": pid, "start_time": 7 })).unwrap()
}

fn key(generation: u64) -> Key {
    Key {
        program: format!("proxy-0.{generation}.0"),
        generation,
    }
}

fn named(pid: u32) -> Option<Named> {
    Some(Named {
        process: process(pid),
        door: PathBuf::from(format!("/doors/{pid}")),
    })
}

fn attempt(generation: u64, pid: Option<u32>, giver: Option<u32>) -> Attempt {
    Attempt {
        origin: Origin {
            key: key(generation),
            path: PathBuf::from("/bin/true"),
            version: format!("0.{generation}.0"),
        },
        workers: 2,
        giver: giver.map(|pid| PathBuf::from(format!("/doors/{pid}"))),
        process: pid.map(process),
        since_unix_ms: 0,
    }
}

/// A story: who is named, and who is dead.
#[derive(Default)]
struct Story {
    runs: Runs,
    dead: Vec<u32>,
    now_ms: u64,
}

impl Story {
    /// A process of generation 1 serves.
    fn begun() -> Self {
        let mut story = Self::default();
        story.runs.attempt = Some(attempt(1, Some(1), None));
        assert_eq!(story.names(1), Seen::Started { relieved: false });
        story
    }

    fn hands_over(&mut self, generation: u64, pid: u32) {
        let giver = self.runs.serving.as_ref().map(|run| run.process.pid);
        self.runs.attempt = Some(attempt(generation, Some(pid), giver));
        assert_eq!(self.names(pid), Seen::Started { relieved: true });
    }

    fn names(&mut self, pid: u32) -> Seen {
        let dead = self.dead.clone();
        let alive = |process: &Process| !dead.contains(&process.pid);
        let known = named(pid).filter(|named| alive(&named.process));
        self.runs.see(known, (key(9), 4), alive, self.now_ms)
    }

    fn dies(&mut self, pid: u32) -> Ended {
        self.dead.push(pid);
        let dead = self.dead.clone();
        self.runs.reap(|process| !dead.contains(&process.pid))
    }

    fn serving(&self) -> Option<(u32, u64)> {
        let run = self.runs.serving.as_ref()?;
        Some((run.process.pid, run.origin.key.generation))
    }

    fn warm(&self) -> Option<u32> {
        self.runs.warm().map(|spare| spare.run.process.pid)
    }
}

#[test]
fn only_the_last_one_that_was_relieved_can_take_back() {
    let mut story = Story::begun();
    assert_eq!(story.warm(), None);
    story.hands_over(2, 2);
    assert_eq!((story.serving(), story.warm()), (Some((2, 2)), Some(1)));
    story.hands_over(3, 3);
    assert_eq!((story.serving(), story.warm()), (Some((3, 3)), Some(2)));
    let mut other = Story {
        runs: story.runs.clone(),
        ..Story::default()
    };
    other.dies(2);
    assert_eq!(other.warm(), None, "the first one gave to another process");
    assert_eq!(story.names(2), Seen::TakenBack);
    assert_eq!((story.serving(), story.warm()), (Some((2, 2)), Some(3)));
    story.dies(3);
    assert_eq!(
        story.warm(),
        Some(1),
        "the one that it gave to serves again"
    );
}

#[test]
fn a_spare_that_did_not_take_back_is_not_asked_again() {
    let mut story = Story::begun();
    story.hands_over(2, 2);
    story.runs.spares[0].refused = true;
    assert_eq!(story.warm(), None);
}

#[test]
fn the_one_that_ended_before_a_spare_serves_again_is_named_in_any_order() {
    let mut story = Story::begun();
    story.hands_over(2, 2);
    assert_eq!(story.dies(2).serving, Some(process(2)));
    assert_eq!(story.serving(), None);
    let seen = story.names(1);
    assert!(matches!(&seen, Seen::Reinstated { ended } if ended.origin.key == key(2)));
    assert_eq!(story.serving(), Some((1, 1)));

    let mut story = Story::begun();
    story.hands_over(2, 2);
    story.dead.push(2);
    let seen = story.names(1);
    assert!(matches!(&seen, Seen::Reinstated { ended } if ended.origin.key == key(2)));
    assert_eq!(story.runs.spares, vec![], "who is dead is no spare");
}

#[test]
fn the_end_of_one_that_was_gone_back_to_is_no_failure_of_it() {
    let mut story = Story::begun();
    story.hands_over(2, 2);
    story.names(1);
    story.dies(1);
    assert_eq!(story.names(2), Seen::TakenBack);
    assert_eq!(story.serving(), Some((2, 2)));
}

#[test]
fn an_agent_that_died_as_it_started_a_process_finds_it_or_begins_anew() {
    for found in [Some(process(5)), None] {
        let mut story = Story::begun();
        story.runs.attempt = Some(attempt(2, None, Some(1)));
        story.runs.adopt(|_, known| {
            assert_eq!(known, [process(1)], "those are somebody else");
            found
        });
        assert_eq!(story.runs.attempt.is_some(), found.is_some());
        story.runs.adopt(|_, _| panic!("it is known"));
    }
}

#[test]
fn an_attempt_that_ends_is_told_once_and_changes_nothing() {
    let mut story = Story::begun();
    story.runs.attempt = Some(attempt(2, Some(2), Some(1)));
    let ended = story.dies(2);
    assert_eq!(ended.attempt.map(|a| a.origin.key), Some(key(2)));
    assert_eq!(story.dies(2), Ended::default());
    assert_eq!((story.serving(), story.warm()), (Some((1, 1)), None));
}

#[test]
fn a_process_started_by_hand_stands_for_what_was_to_run() {
    let mut story = Story::begun();
    assert_eq!(story.names(8), Seen::Stranger);
    assert_eq!((story.serving(), story.warm()), (Some((8, 1)), Some(1)));
    let mut unknown = Story::default();
    assert_eq!(unknown.names(8), Seen::Stranger);
    assert_eq!(unknown.serving(), Some((8, 9)), "as it is assigned");
}

#[test]
fn spares_that_are_too_old_or_too_many_are_overdue() {
    let mut story = Story::begun();
    for pid in 2..=6 {
        story.now_ms = u64::from(pid);
        story.hands_over(pid.into(), pid);
    }
    let overdue = |story: &Story, now| -> Vec<u32> {
        story.runs.overdue(now).map(|process| process.pid).collect()
    };
    assert_eq!(
        overdue(&story, 6),
        [1],
        "the oldest of more than {SPARES_MAX}"
    );
    assert_eq!(overdue(&story, 4 + SPARE_LIMIT_MS), [1, 2]);
    assert_eq!(
        overdue(&story, 0),
        [1],
        "a clock that was set back ends nobody"
    );
}

#[test]
fn what_is_gone_back_to_is_what_served_last_of_another_key() {
    let mut story = Story::begun();
    assert_eq!(story.runs.before(&key(1)), None);
    story.hands_over(2, 2);
    let before = |story: &Story, of| story.runs.before(&key(of)).map(|o| o.key.generation);
    assert_eq!((before(&story, 2), before(&story, 3)), (Some(1), Some(2)));
    story.dies(2);
    story.names(1);
    assert_eq!(before(&story, 2), Some(1));
    assert_eq!(
        story.runs.known("proxy-0.2.0").map(|o| o.key.generation),
        Some(2)
    );
}

#[test]
fn the_journal_reads_back_what_was_written_and_names_the_programs_that_are_needed() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Runs::load(dir.path()), None);
    let mut story = Story::begun();
    story.hands_over(2, 2);
    story.runs.attempt = Some(attempt(3, None, Some(2)));
    story.runs.failure = Some(Failure {
        key: key(4),
        why: "it ended".to_owned(),
    });
    story.runs.save(dir.path()).unwrap();
    let read = Runs::load(dir.path()).unwrap();
    assert_eq!(read, story.runs);
    assert!(read.has_failed(&key(4)) && !read.has_failed(&key(3)));
    let programs: Vec<_> = read.programs().into_iter().collect();
    assert_eq!(programs, ["proxy-0.1.0", "proxy-0.2.0", "proxy-0.3.0"]);
}
