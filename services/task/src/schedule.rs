//! When a task may begin, and what may still be said to one: times, maintenance windows, menus.
//!
//! Invariant: a task that is scheduled has no effect and no shard before its time; its plan is made
//! anew when it begins.

use slotmesh_topology::{Shard, TaskId};

use crate::{
    admit::{Refusal, RefusalKind},
    failover, replace,
    spec::{Choice, Phase, ShardSwitch, Spec, State, Task},
    table::{self, Undo},
    upgrade,
};

/// How far ahead a task may be scheduled: what is further away is a reminder, not a task.
pub const AHEAD_MS_MAX: u64 = 30 * DAY_MS;
/// A window has to leave room for what is done in it.
pub const WINDOW_MINUTES_MIN: u32 = 60;

/// Past holds that a prediction is made from.
const PREDICTED_FROM: usize = 10;
const DAY_MS: u64 = 24 * 60 * MINUTE_MS;
const MINUTE_MS: u64 = 60 * 1_000;
const DAY_MINUTES: u32 = 24 * 60;

/// A maintenance window: the same minutes of each day, in UTC.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Window {
    from: u32,
    minutes: u32,
}

impl Window {
    /// Reads a window that somebody wants, `HH:MM-HH:MM` or `HH:MMZ-HH:MMZ`; one whose end is before
    /// its begin goes over midnight.
    ///
    /// # Errors
    /// When it is not of that form, or shorter than [`WINDOW_MINUTES_MIN`].
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let window = Self::read(text)?;
        if window.minutes < WINDOW_MINUTES_MIN {
            let message = format!("a maintenance window has at least {WINDOW_MINUTES_MIN} minutes");
            return Err(invalid(message));
        }
        Ok(window)
    }

    /// Reads a window that an instance has: earlier releases took shorter ones.
    ///
    /// # Errors
    /// When it is not of that form, or empty.
    pub fn read(text: &str) -> Result<Self, Refusal> {
        let parts = text
            .split_once('-')
            .and_then(|(from, to)| Some((minute_of_day(from)?, minute_of_day(to)?)));
        let Some((from, to)) = parts else {
            return Err(invalid(format!(
                "a maintenance window is HH:MM-HH:MM in UTC, such as 02:00-03:30, not {text:?}"
            )));
        };
        let minutes = (to + DAY_MINUTES - from) % DAY_MINUTES;
        if minutes == 0 {
            return Err(invalid(
                "a maintenance window has an end that is not its begin".into(),
            ));
        }
        Ok(Self { from, minutes })
    }

    /// `now_ms` when that is inside of it, else when it opens next.
    #[must_use]
    pub fn next_ms(self, now_ms: u64) -> u64 {
        let since_open = (now_ms % DAY_MS + DAY_MS - u64::from(self.from) * MINUTE_MS) % DAY_MS;
        if since_open < u64::from(self.minutes) * MINUTE_MS {
            now_ms
        } else {
            now_ms + DAY_MS - since_open
        }
    }
}

fn invalid(message: String) -> Refusal {
    Refusal {
        kind: RefusalKind::Invalid,
        reason: "WINDOW_INVALID",
        message,
    }
}

/// `HH:MM`, with or without the Z that says UTC.
fn minute_of_day(text: &str) -> Option<u32> {
    let text = text.strip_suffix('Z').unwrap_or(text);
    let (hours, minutes) = text.split_once(':')?;
    let two_digits = |part: &str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_digit());
    if !two_digits(hours) || !two_digits(minutes) {
        return None;
    }
    let (hours, minutes): (u32, u32) = (hours.parse().ok()?, minutes.parse().ok()?);
    (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
}

/// Checks a time that a caller named; one that has passed means now.
///
/// # Errors
/// When it is more than [`AHEAD_MS_MAX`] ahead.
pub fn at(at_ms: u64, now_ms: u64) -> Result<u64, Refusal> {
    if at_ms > now_ms + AHEAD_MS_MAX {
        return Err(Refusal {
            kind: RefusalKind::Invalid,
            reason: "TOO_FAR_AHEAD",
            message: "a task can be scheduled for the next 30 days".into(),
        });
    }
    Ok(if at_ms <= now_ms { 0 } else { at_ms })
}

/// Has not begun, and has no shard: its time may be changed, and its end needs no unlocking.
#[must_use]
pub fn is_scheduled(task: &Task) -> bool {
    match &task.spec {
        // What it does before its time touches nothing that serves.
        Spec::Upgrade(upgrade) => !task.state.is_ended() && !upgrade.has_begun(),
        _ => task.state == State::Pending && task.not_before_ms > 0,
    }
}

/// How long requests of each shard will wait, in milliseconds: the longest wait of the instance's last
/// switchovers, newest first in `others`. 0: unknown, or the task holds nothing (any more).
#[must_use]
pub fn predicted_hold_ms<'a>(task: &Task, others: impl Iterator<Item = &'a Task>) -> f64 {
    if task.state.is_ended() || !matches!(task.spec, Spec::Switchover(_) | Spec::Upgrade(_)) {
        return 0.0;
    }
    let past = others.filter(|other| other.instance == task.instance);
    let holds = past
        .flat_map(|other| match &other.spec {
            Spec::Switchover(switches) => switches.iter().collect(),
            Spec::Upgrade(upgrade) => {
                let parts = upgrade.shards.iter();
                parts.filter_map(|s| s.switch.as_ref()).collect()
            }
            _ => Vec::new(),
        })
        .filter(|switch| switch.phase == Phase::Done && switch.hold_us > 0)
        .take(PREDICTED_FROM)
        .map(|switch| switch.hold_us);
    let longest_us = holds.max().unwrap_or(0);
    std::time::Duration::from_micros(longest_us).as_secs_f64() * 1_000.0
}

/// What an operator may choose for a task that can't go on by itself.
#[must_use]
pub fn menu(task: &Task) -> &'static [Choice] {
    match (&task.spec, task.state) {
        (Spec::Failover(_), _) => failover::menu(task),
        (Spec::Replace(_), _) => replace::menu(task),
        (Spec::Upgrade(_), _) => upgrade::menu(task),
        (Spec::Provision, State::NeedsOperator) => &[Choice::Retry, Choice::Undo],
        (Spec::Decommission | Spec::Switchover(_), State::NeedsOperator) => &[Choice::Retry],
        _ => &[],
    }
}

/// The task once more, from where it ended, for what it did not reach.
///
/// # Errors
/// When its menu does not have that.
pub fn retried(task: &Task, now_ms: u64) -> Result<Task, Refusal> {
    if !menu(task).contains(&Choice::Retry) {
        return Err(not_on_the_menu(task));
    }
    let mut next = task.clone();
    next.deadline_ms = now_ms + task.deadline_ms.saturating_sub(task.created_ms);
    next.cancel_requested = false;
    // A choice that was made and not acted upon yet is taken back.
    next.choice = None;
    match &mut next.spec {
        Spec::Switchover(switches) => {
            // Its shards were freed when it ended: it begins as one that was scheduled.
            next.state = State::Pending;
            next.not_before_ms = now_ms.max(1);
            for switch in switches.iter_mut().filter(|s| s.phase != Phase::Done) {
                switch.phase = Phase::Preflight;
            }
        }
        Spec::Failover(_) | Spec::Replace(_) => next.choice = Some(Choice::Retry),
        Spec::Upgrade(_) => return Ok(upgrade::retried(next, now_ms)),
        Spec::Provision | Spec::Decommission => next.state = State::Running,
    }
    Ok(next)
}

/// The refusal of a choice that makes no sense now, with those that do.
#[must_use]
pub fn not_on_the_menu(task: &Task) -> Refusal {
    let choices: Vec<&str> = menu(task).iter().map(|c| c.name()).collect();
    let message = if choices.is_empty() {
        "the task does not wait for an operator".to_owned()
    } else {
        format!("this task can be told: {}", choices.join(", "))
    };
    Refusal {
        kind: RefusalKind::Precondition,
        reason: "CHOICE_NOT_OFFERED",
        message,
    }
}

/// As [`not_on_the_menu`], with the reason when it is that what was done can't be put back.
#[must_use]
pub fn refused_choice(task: &Task, choice: Choice) -> Refusal {
    let mut refusal = not_on_the_menu(task);
    let why = match table::current(&task.spec).first().map(|row| row.undo) {
        Some(Undo::No(why)) if choice == Choice::Undo && task.state == State::NeedsOperator => why,
        _ => return refusal,
    };
    refusal.message.push_str("; it can't be undone: ");
    refusal.message.push_str(why);
    refusal
}

/// What a scheduled switchover finds when its time comes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Beginning {
    /// Begin with these switches.
    Begin(Vec<ShardSwitch>),
    /// A shard belongs to another task.
    Busy(TaskId),
}

/// Plans the switches of a scheduled switchover anew: primaries may have changed since.
#[must_use]
pub fn begin(
    switches: &[ShardSwitch],
    shards: &[Shard],
    owner: impl Fn(&ShardSwitch) -> Option<TaskId>,
    now_ms: u64,
) -> Beginning {
    let mut next = Vec::new();
    for switch in switches {
        let mut switch = switch.clone();
        if switch.phase == Phase::Done {
            next.push(switch);
            continue;
        }
        if let Some(owner) = owner(&switch) {
            return Beginning::Busy(owner);
        }
        switch.phase_since_ms = now_ms.max(switch.phase_since_ms + 1);
        switch.message.clear();
        match shards.iter().find(|s| s.id == switch.shard) {
            Some(shard) if shard.primary == switch.to => {
                switch.phase = Phase::Done;
                switch.message = "it is the primary already".into();
            }
            Some(shard) if shard.member(&switch.to).is_some() => {
                switch.from = shard.primary.clone();
                switch.from_epoch = shard.epoch;
            }
            _ => {
                switch.phase = Phase::RolledBack;
                switch.message = format!("{} is not of this shard any more", switch.to);
            }
        }
        next.push(switch);
    }
    Beginning::Begin(next)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR_MS: u64 = 60 * MINUTE_MS;

    #[test]
    fn a_window_is_open_now_or_opens_next() {
        let window = Window::parse("02:00-03:30").unwrap();
        let day = 20_000 * DAY_MS;
        assert_eq!(window.next_ms(day), day + 2 * HOUR_MS);
        assert_eq!(window.next_ms(day + 3 * HOUR_MS), day + 3 * HOUR_MS);
        let late = day + 4 * HOUR_MS;
        assert_eq!(window.next_ms(late), day + DAY_MS + 2 * HOUR_MS);
        let night = Window::parse("23:00-01:00").unwrap();
        assert_eq!(night.next_ms(day), day, "over midnight");
        assert_eq!(night.next_ms(day + HOUR_MS), day + 23 * HOUR_MS);
    }

    #[test]
    fn a_window_may_say_that_it_is_utc_and_an_old_short_one_is_still_read() {
        assert_eq!(Window::parse("23:30Z-00:30Z"), Window::parse("23:30-00:30"));
        assert!(Window::parse("02:00-02:30").is_err());
        assert!(Window::read("02:00-02:30").is_ok());
    }

    #[test]
    fn what_is_no_window_is_refused() {
        for text in [
            "",
            "2-3",
            "02:00",
            "24:00-03:00",
            "02:00-02:59",
            "02:00Z-02:30Z",
            "02:00ZZ-03:00Z",
            "2:00-03:00",
            "02:00-02:00",
            "+2:00-03:00",
        ] {
            assert_eq!(
                Window::parse(text).unwrap_err().reason,
                "WINDOW_INVALID",
                "{text}"
            );
        }
    }

    #[test]
    fn a_time_that_has_passed_is_now_and_one_too_far_is_refused() {
        assert_eq!(at(5, 10), Ok(0));
        assert_eq!(at(11, 10), Ok(11));
        assert_eq!(
            at(11 + AHEAD_MS_MAX, 10).unwrap_err().reason,
            "TOO_FAR_AHEAD"
        );
    }

    fn switch(to: &str) -> ShardSwitch {
        ShardSwitch {
            shard: "0".into(),
            from: "a".into(),
            to: to.into(),
            from_epoch: slotmesh_topology::Epoch(1),
            phase: Phase::Preflight,
            phase_since_ms: 1,
            message: String::new(),
            hold_us: 0,
            critical_us: 0,
        }
    }

    fn shard() -> Shard {
        let member = |node: &str, role| slotmesh_topology::Member {
            node: node.into(),
            host: "h".into(),
            role,
            run_id: "x".into(),
            address: "x:1".into(),
            in_sync: true,
            priority: slotmesh_topology::PRIORITY,
            leaving: false,
            engine: String::new(),
            exchange: None,
        };
        Shard {
            instance: "r".into(),
            id: "0".into(),
            index: 0,
            slots: slotmesh_topology::slot::split_evenly(1),
            epoch: slotmesh_topology::Epoch(7),
            primary: "b".into(),
            members: vec![
                member("a", slotmesh_topology::NodeRole::Replica),
                member("b", slotmesh_topology::NodeRole::Primary),
            ],
            mode: slotmesh_topology::Mode::Serving,
            closed_epoch: slotmesh_topology::Epoch(6),
            departures: Vec::new(),
            roster: Default::default(),
        }
    }

    #[test]
    fn what_was_scheduled_is_planned_anew_when_it_begins() {
        let plan = |to: &str| match begin(&[switch(to)], &[shard()], |_| None, 9) {
            Beginning::Begin(switches) => switches[0].clone(),
            Beginning::Busy(task) => panic!("busy with {task}"),
        };
        let moved = plan("a");
        assert_eq!((moved.from.as_str(), moved.from_epoch.0), ("b", 7));
        assert_eq!(plan("b").phase, Phase::Done);
        assert_eq!(plan("gone").phase, Phase::RolledBack);
        let busy = begin(&[switch("a")], &[shard()], |_| Some("t-2".into()), 9);
        assert_eq!(busy, Beginning::Busy("t-2".into()));
    }
}
