//! What must hold of failovers: why they began, and what they left behind.
//!
//! Invariant: what is judged is what really was, not what anybody had seen of it.

use slotmesh_topology::Shard;

use super::World;
use crate::{
    msg::Party,
    plan::Profile,
    redis::{Kind, Op},
    sched::{MS, Micros, SEC},
};

/// What was wrong so long ago may still be the reason.
const REASON: Micros = 10 * SEC;
/// A primary whose agent is away is ended by the fencer once its replicas have acknowledged nothing
/// for more than 2 whole seconds, a second after the last time at most: docs/guarantees.md names it.
const FENCER_SEES: Micros = 3 * SEC + 200 * MS;

impl World {
    /// What must hold at every instant.
    pub(super) fn check_now(&mut self) {
        self.check_failovers();
        self.check_left();
        for shard in 0..self.shape.shards {
            let mut ctx = self.ctx.borrow_mut();
            let now = ctx.now();
            let of_shard = self.nodes.iter().filter(|n| n.shard == shard);
            // Nobody can take what a process has that stands still; it is taken when it wakes.
            let awake = of_shard.filter(|n| !ctx.is_asleep(Party::Node(n.index)));
            let mut writable: Vec<_> = awake
                .filter_map(|n| Some((n, n.process.as_ref()?.writable_as()?)))
                .collect();
            let since = ctx.checks.several_since(shard, writable.len() > 1, now);
            if since + FENCER_SEES > now {
                writable.retain(|(n, _)| !ctx.checks.is_unwatched(n.host, now));
            }
            if let [(a, as_a), (b, as_b), ..] = writable[..] {
                let how = format!("{} takes writes of {as_a}, {} of {as_b}", a.name, b.name);
                let rule = "A2/I1: at most one process takes writes";
                ctx.checks.fail(rule, || how);
            }
        }
    }

    /// The process that the record names is there for its proxies.
    pub(super) fn takes_writes(&self, shard: &Shard) -> bool {
        let Some(named) = shard.primary_member() else {
            return false;
        };
        let node = self.nodes.iter().find(|n| n.name == named.node.as_str());
        let process = node.and_then(|n| n.process.as_ref());
        process.is_some_and(|p| p.run_id == named.run_id && p.writable_as().is_some())
    }

    pub(super) fn check_failovers(&self) {
        let (declared, done) = {
            let mut ctx = self.ctx.borrow_mut();
            let now = ctx.now();
            let checks = &mut ctx.checks;
            checks.look_for_replaced(now);
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
        let profile = self.shape.profile;
        // With a tenth of all calls lost a host may keep no lease and get no promise. Its own agent
        // has fenced it then, and somebody else may serve.
        let process = node.process.as_ref();
        let takes_writes = process.is_some_and(|p| p.writable_as().is_some());
        let is_fenced =
            weather && !takes_writes && matches!(profile, Profile::ControlPlane | Profile::Double);
        let may_be_lost = excused && self.shape.loses_primaries();
        if !may_be_lost && !is_fenced {
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
