//! When a task may begin, and what may still be said to one: times, maintenance windows, menus.
//!
//! Invariant: a task that is scheduled has no effect and no shard before its time; its plan is made
//! anew when it begins.

use slotmesh_topology::{Shard, TaskId};

use crate::{
    admit::{Refusal, RefusalKind},
    failover, proxies, replace,
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

    fn opens_at(self, at_ms: u64) -> bool {
        at_ms % DAY_MS == u64::from(self.from) * MINUTE_MS
    }
}

/// When what begins only in the maintenance window may begin; `None`: now. An instance without a window
/// has it open always. `rests_ms`: windows do not count for so long; see [`crate::steady`].
#[must_use]
pub fn opens_ms(maintenance_window: &str, now_ms: u64, rests_ms: u64) -> Option<u64> {
    let window = Window::read(maintenance_window).ok()?;
    let opens_ms = window.next_ms(now_ms.saturating_add(rests_ms));
    (opens_ms > now_ms).then_some(opens_ms)
}

/// The task with the time that the window, as it is now, gives it: its time has come and the window is not
/// open, or it opens at another time than the one that was planned. While windows do not count, for
/// `rests_ms`, it only says so, and keeps its times: what they would be made from may be the wrong time.
#[must_use]
pub fn retimed(task: &Task, maintenance_window: &str, now_ms: u64, rests_ms: u64) -> Option<Task> {
    if !task.in_window || !is_scheduled(task) {
        return None;
    }
    // One whose window was taken away keeps the time that it had.
    let window = Window::read(maintenance_window).ok()?;
    let has_come = now_ms >= task.not_before_ms;
    let mut next = task.clone();
    if rests_ms > 0 {
        let why = "the controller's clock has jumped: it begins when the clock has been steady for \
                   a while, its time has come by it, and the maintenance window is open";
        next.message = why.into();
        return has_come.then_some(next);
    }
    let begins_ms = window.next_ms(now_ms);
    if begins_ms == task.not_before_ms || has_come && begins_ms == now_ms {
        return None;
    }
    let limit_ms = task.deadline_ms.saturating_sub(task.not_before_ms);
    next.not_before_ms = begins_ms;
    next.deadline_ms = begins_ms.saturating_add(limit_ms);
    next.message = match has_come && window.opens_at(task.not_before_ms) {
        true => "its time had come, and the maintenance window was not open: its shards were busy or no \
                 controller led while it was, or the clock jumped; it begins in the next one"
            .into(),
        // It has another window than the one that its time was made from, or was told to try again.
        false => format!("it begins in the maintenance window, which is {maintenance_window} UTC now"),
    };
    Some(next)
}

/// The time before which a task begins nothing; 0: none. What is made of parts that wait for the window has
/// its time from the window as it is now, not from the one that it was admitted with.
pub(crate) fn time_ms(task: &Task, maintenance_window: &str) -> u64 {
    let has_parts = matches!(task.spec, Spec::Upgrade(_) | Spec::Proxies(_));
    match has_parts && waits_for_window(task) && Window::read(maintenance_window).is_ok() {
        true => 0,
        false => task.not_before_ms,
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
        Spec::Proxies(changes) => !task.state.is_ended() && !changes.has_begun(),
        _ => task.state == State::Pending && task.not_before_ms > 0,
    }
}

/// When a task that is scheduled begins, as far as is known; `None`: it has begun, or waits for no time.
/// Trials that it does meanwhile touch nothing that serves.
#[must_use]
pub fn planned_ms(
    task: &Task,
    maintenance_window: &str,
    now_ms: u64,
    rests_ms: u64,
) -> Option<u64> {
    if !is_scheduled(task) {
        return None;
    }
    let opens_ms = match waits_for_window(task) {
        true => opens_ms(maintenance_window, now_ms, rests_ms),
        false => None,
    };
    let planned_ms = opens_ms.unwrap_or(0).max(time_ms(task, maintenance_window));
    (planned_ms > now_ms).then_some(planned_ms)
}

/// It, or what it is made of, begins in the maintenance window only.
fn waits_for_window(task: &Task) -> bool {
    match &task.spec {
        Spec::Upgrade(upgrade) => upgrade.in_window,
        Spec::Proxies(changes) => changes.in_window,
        _ => task.in_window,
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
        (Spec::Proxies(_), _) => proxies::menu(task),
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
        Spec::Proxies(_) => return Ok(proxies::retried(next, now_ms)),
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
#[path = "schedule_tests.rs"]
mod tests;
