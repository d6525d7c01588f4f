//! What an upgrade must not cost: what a command takes at the new primary, and how long a switch holds.
//!
//! Invariant: a gate compares what was counted in the same way before and after; what was not counted on
//! either side closes none.

use slotmesh_topology::Shard;

use super::{
    FAULTS_MAX, FAULTS_WINDOW_MS, ShardUpgrade, TROUBLE_MS_MAX, Upgrade, UpgradePhase, View,
};
use crate::observe::{CommandCost, Fleet, ServedWindow};

/// Longest hold of a switch after which others are made without asking, where nothing else is said: many
/// times what a switch takes, and less than what clients wait for an answer.
pub const HOLD_MS: u32 = 1_000;

/// So many times what it was before is no noise of a machine, nor what one release takes more than another.
const TIMES_MAX: u64 = 3;
/// It has to be so much more as well, in nanoseconds per command: of commands that take 2 µs, a processor
/// that is taken away for some milliseconds makes many times as much.
const MORE_NS_MIN: u64 = 50_000;
/// Commands on either side, so that single ones do not decide.
const CALLS_MIN: u64 = 1_000;
/// Of one command, to be compared at all.
const CALLS_EACH_MIN: u64 = 20;
/// Windows in a row.
const WINDOWS: usize = 2;

/// What commands have cost the shard's primary up to now; empty: it was not counted.
pub(super) fn costs(view: &View<'_>) -> Vec<CommandCost> {
    let primary = view.scene.fleet.node(&view.shard.primary);
    let windows = primary.map_or(&[][..], |n| &n.served);
    let mut costs: Vec<CommandCost> = Vec::new();
    let commands = windows
        .iter()
        .filter(|w| w.epoch == view.shard.epoch)
        .flat_map(|w| &w.commands);
    for cost in commands {
        match costs.iter_mut().find(|c| c.name == cost.name) {
            Some(known) => {
                known.calls = known.calls.saturating_add(cost.calls);
                known.usec = known.usec.saturating_add(cost.usec);
            }
            None => costs.push(cost.clone()),
        }
    }
    costs
}

/// What a command takes in nanoseconds, before and now, weighted as they were called before; `None`: there
/// were too few of those that were called both times.
fn compared(before: &[CommandCost], now: &[CommandCost]) -> Option<(u64, u64)> {
    let is_enough = |c: &&CommandCost| c.calls >= CALLS_EACH_MIN;
    let (mut calls, mut calls_now, mut spent, mut spent_now) = (0, 0, 0, 0);
    for old in before.iter().filter(is_enough) {
        let Some(new) = now.iter().filter(is_enough).find(|c| c.name == old.name) else {
            continue;
        };
        calls += u128::from(old.calls);
        calls_now += u128::from(new.calls);
        spent += u128::from(old.usec) * 1_000;
        spent_now += u128::from(new.usec) * 1_000 * u128::from(old.calls) / u128::from(new.calls);
    }
    let is_enough = calls.min(calls_now) >= u128::from(CALLS_MIN);
    let mean = |spent: u128| u64::try_from(spent / calls.max(1)).unwrap_or(u64::MAX);
    is_enough.then(|| (mean(spent), mean(spent_now)))
}

fn is_slow((before_ns, now_ns): (u64, u64)) -> bool {
    now_ns > before_ns.saturating_mul(TIMES_MAX) && now_ns - before_ns >= MORE_NS_MIN
}

/// What the shard's primary has served, the newest first, but the very first: that has what clients made up
/// for after the switch.
fn windows<'a>(fleet: &'a Fleet, shard: &'a Shard) -> impl Iterator<Item = &'a ServedWindow> {
    let primary = fleet.node(&shard.primary);
    let windows = primary.into_iter().flat_map(|n| &n.served);
    windows.filter(|w| w.epoch == shard.epoch && w.number > 0)
}

/// Faults of the shard's primary, by all proxies that are heard.
pub(super) fn faults(fleet: &Fleet, shard: &Shard) -> u64 {
    let fresh = fleet.fresh_proxies(&shard.instance);
    fresh.filter_map(|p| p.faults.get(&shard.id)).sum()
}

/// More is too many, after so many before the switch.
pub(super) fn faults_max(before: u64) -> u64 {
    2 * before + FAULTS_MAX
}

/// For how many milliseconds each proxy has had trouble with the shard's primary, of those that have.
pub(super) fn troubles<'a>(fleet: &'a Fleet, shard: &'a Shard) -> impl Iterator<Item = u64> + 'a {
    let fresh = fleet.fresh_proxies(&shard.instance);
    let troubles = fresh.filter_map(|p| p.troubles.get(&shard.id));
    troubles.filter_map(|(epoch, ms)| (*epoch == shard.epoch).then_some(*ms))
}

/// Why the new primary is too slow, if it is.
pub(super) fn too_slow(view: &View<'_>) -> Option<String> {
    let before = &view.part.rollback.as_ref()?.costs_before;
    let means: Vec<(u64, u64)> = windows(view.scene.fleet, view.shard)
        .map(|w| compared(before, &w.commands).filter(|means| is_slow(*means)))
        .take(WINDOWS)
        .collect::<Option<_>>()?;
    if means.len() < WINDOWS {
        return None;
    }
    let (before_ns, now_ns) = *means.first()?;
    let shown = |ns: u64| format!("{}.{} µs", ns / 1_000, ns % 1_000 / 100);
    Some(format!(
        "a command takes {} {} on average, and has taken {} before the switch, of the same commands as \
         often",
        view.shard.primary,
        shown(now_ns),
        shown(before_ns)
    ))
}

/// Pauses the upgrade when a switch of the shard has held commands for too long; `held_us` is what its
/// longest one had before. Without a shard that has yet to begin there is nothing to pause.
pub(super) fn pause(upgrade: &mut Upgrade, shard: &slotmesh_topology::ShardId, held_us: u64) {
    let max_us = u64::from(upgrade.max_hold_ms) * 1_000;
    let part = upgrade.shards.iter().find(|s| s.shard == *shard);
    let held = part.map_or(0, |s| s.hold_us);
    let waits = |s: &ShardUpgrade| s.phase.is_before();
    if max_us == 0 || held <= held_us.max(max_us) || !upgrade.shards.iter().any(waits) {
        return;
    }
    upgrade.paused = true;
    upgrade.paused_why = format!(
        "a switch of shard {shard} held commands for {} ms, more than {} ms; resume when that may happen \
         again, or cancel",
        held / 1_000,
        upgrade.max_hold_ms
    );
}

/// One gate as it is shown; what is not known, or not there, is `None`.
#[derive(Clone, PartialEq, Debug)]
pub struct Gate {
    /// Name as users see it.
    pub name: &'static str,
    /// Of the numbers.
    pub unit: &'static str,
    /// The switch.
    pub before: Option<f64>,
    /// Heard last.
    pub now: Option<f64>,
    /// More breaks it.
    pub limit: Option<f64>,
}

/// What is heard of a shard.
#[derive(Debug, Clone, Copy)]
pub struct Heard<'a> {
    /// By a leader.
    pub fleet: &'a Fleet,
    /// The shard's record.
    pub shard: &'a Shard,
    /// Now, in milliseconds since the epoch.
    pub now_ms: u64,
}

/// The gates of a shard that is under way, by what decides about them.
#[must_use]
pub fn gates(upgrade: &Upgrade, part: &ShardUpgrade, heard: Option<Heard<'_>>) -> Vec<Gate> {
    if part.phase.is_before() || part.phase.is_ended() {
        return Vec::new();
    }
    let last_us = part.switch.as_ref().map_or(0, |s| s.hold_us);
    let held_us = Some(part.hold_us.max(last_us)).filter(|us| *us > 0);
    let mut gates = vec![Gate {
        name: "Hold",
        unit: "ms",
        before: None,
        now: held_us.map(|us| number(us) / 1_000.0),
        limit: (upgrade.max_hold_ms > 0).then(|| upgrade.max_hold_ms.into()),
    }];
    // The others are looked at while there is a way back.
    let is_watched = matches!(part.phase, UpgradePhase::Switch | UpgradePhase::Bake);
    let Some(rollback) = part.rollback.as_ref().filter(|r| is_watched && r.open) else {
        return gates;
    };
    let heard =
        heard.filter(|h| part.phase == UpgradePhase::Bake && h.shard.primary == rollback.new);
    // Until then it counts what was before the switch, too.
    let counts = heard.filter(|h| h.now_ms >= part.phase_since_ms + FAULTS_WINDOW_MS);
    let now = counts.map(|h| faults(h.fleet, h.shard));
    gates.push(Gate {
        name: "Faults",
        unit: "in 10 s",
        before: rollback.faults_before.map(number),
        now: now.map(number),
        limit: rollback.faults_before.map(|n| number(faults_max(n))),
    });
    let costs = &rollback.costs_before;
    let newest = heard.and_then(|h| windows(h.fleet, h.shard).next());
    let now = newest.and_then(|w| compared(costs, &w.commands));
    // Of commands that were called both times, or of all as long as none was.
    let before_ns = now.or_else(|| compared(costs, costs)).map(|(ns, _)| ns);
    let limit_ns = before_ns.map(|ns| ns.saturating_mul(TIMES_MAX).max(ns + MORE_NS_MIN));
    let shown = |ns: u64| number(ns) / 1_000.0;
    gates.push(Gate {
        name: "CommandTime",
        unit: "µs",
        before: before_ns.map(shown),
        now: now.map(|(_, ns)| shown(ns)),
        limit: limit_ns.map(shown),
    });
    let trouble = heard.map(|h| troubles(h.fleet, h.shard).max().unwrap_or(0));
    gates.push(Gate {
        name: "ProxyTrouble",
        unit: "ms",
        before: None,
        now: trouble.map(number),
        limit: Some(number(TROUBLE_MS_MAX)),
    });
    gates
}

#[allow(clippy::cast_precision_loss)] // For people.
fn number(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
