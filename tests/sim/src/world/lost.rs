//! What must hold of failovers: why they began, and what they left behind.
//!
//! Invariant: what is judged is what really was, not what anybody had seen of it.

use super::World;
use crate::{
    msg::Party,
    redis::{Kind, Op},
    sched::{Micros, SEC},
};

/// What was wrong so long ago may still be the reason.
const REASON: Micros = 10 * SEC;

impl World {
    pub(super) fn check_failovers(&self) {
        let (declared, done) = {
            let checks = &mut self.ctx.borrow_mut().checks;
            if checks.declared.is_empty() && checks.failed_over.is_empty() {
                return;
            }
            (
                std::mem::take(&mut checks.declared),
                std::mem::take(&mut checks.failed_over),
            )
        };
        for (shard, primary, run_id) in declared {
            self.declared(shard, &primary, &run_id);
        }
        for (_, lost, next) in done {
            self.left_behind(&lost, &next);
        }
    }

    /// A primary is replaced only if something was wrong with it, and not merely with its agent.
    fn declared(&self, shard: usize, primary: &str, run_id: &str) {
        let Some(node) = self.nodes.iter().find(|n| n.name == primary) else {
            return;
        };
        let mut ctx = self.ctx.borrow_mut();
        ctx.checks.failovers += 1;
        let now = ctx.now();
        let lives = node.process.as_ref().is_some_and(|p| p.run_id == run_id);
        let recently = |party: Party| ctx.troubled.get(&party).is_some_and(|at| now < at + REASON);
        let around = (self.nodes.iter())
            .filter(|n| n.shard == shard)
            .map(|n| Party::Node(n.index));
        let weather = now < ctx.bad_weather_until + REASON;
        let excused = !lives || weather || around.into_iter().any(recently);
        if !excused || !self.shape.loses_primaries() {
            let profile = self.shape.profile;
            ctx.checks.fail("D2: an agent that is merely silent is no reason", || {
                format!("{primary} ({run_id}) of shard {shard} is well, and was replaced ({profile:?})")
            });
        }
    }

    /// What the lost primary has, and its successor has not, is lost: in asynchronous mode.
    fn left_behind(&self, lost: &str, next: &str) {
        let log = |name: &str| -> Vec<Op> {
            let node = self.nodes.iter().find(|n| n.name == name);
            let live = node.and_then(|n| n.process.as_ref()).map(|p| &p.log);
            live.or(node.map(|n| &n.disk)).cloned().unwrap_or_default()
        };
        let has: std::collections::BTreeSet<u64> = log(next).iter().map(|op| op.id).collect();
        let is_write = |op: &&Op| matches!(op.kind, Kind::Set | Kind::Push);
        let beyond = log(lost);
        let beyond = beyond.iter().filter(is_write).map(|op| op.id);
        let beyond: Vec<u64> = beyond.filter(|id| !has.contains(id)).collect();
        let mut ctx = self.ctx.borrow_mut();
        ctx.say(|| {
            format!(
                "{next} takes over from {lost}, without {} writes",
                beyond.len()
            )
        });
        if self.shape.durability == 0 || ctx.checks.loss_was_accepted {
            ctx.checks.left_behind.extend(beyond);
        }
    }
}
