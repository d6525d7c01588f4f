//! Tells a story of the plan: to whom it happens now, and when.
//!
//! Invariant: nothing is expected of the mesh but from a shard that was whole when its story began.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use slotmesh_topology::{Mode, Shard};

use super::World;
use crate::{
    ctx::Event,
    msg::Party,
    plan::{
        Kept, Point, Script,
        accident::{around, both_ways, control, controllers},
        story::Story,
    },
    sched::{MS, Micros, SEC},
};

/// A lease, the look for its end, the guard, the choice and the promotion, and a leader that is a
/// little slow.
const REPLACED_WITHIN: Micros = 6 * SEC;

/// To whom it happens.
struct Cast {
    primary: usize,
    host: usize,
    /// Nodes of the shard but the primary.
    replicas: Vec<Party>,
    /// The other agents.
    peers: Vec<Party>,
    /// A controller that does not lead, and one that does, or could.
    follower: usize,
    leader: usize,
}

impl World {
    /// Several things go wrong around a shard's present primary.
    pub(super) fn tell(&mut self, story: Story, shard: usize, number: u64) {
        let Some((record, cast)) = self.cast(shard) else {
            return;
        };
        let mut rng = SmallRng::seed_from_u64(number);
        if story.ends_replaced() && is_whole(&record) {
            let by = self.ctx.borrow().now() + REPLACED_WITHIN;
            let lost = record.primary.to_string();
            self.ctx
                .borrow_mut()
                .checks
                .expect_replaced(shard, &lost, by);
        }
        match story {
            Story::Promised => self.promised(&cast, &mut rng),
            Story::Hangs => self.hangs(&cast, &mut rng),
            Story::StaleReturn => self.stale_return(&cast, &mut rng),
            Story::HostDies => self.later(0, Script::CrashHost(cast.host, Kept::All, 20 * SEC)),
            Story::DiesUnseen => {
                let long = rng.random_range(200 * MS..2_500 * MS);
                self.later(0, Script::Stall(Party::Agent(cast.host), long));
                let die = rng.random_range(0..long);
                self.later(die, Script::CrashNode(cast.primary, Kept::All));
            }
            Story::CutTwice => self.cut_twice(&cast, &mut rng),
            Story::StoreOut => self.store_out(&cast, &mut rng),
            Story::JoinerDies | Story::JoinerLost => {
                let joiner = record.members.last().map(|m| m.node.to_string());
                self.strikes(joiner, story == Story::JoinerLost, &mut rng);
            }
            Story::LeaverDies | Story::LeaverLost => {
                let leaver = record.members.iter().find(|m| m.leaving);
                let leaver = leaver.map(|m| m.node.to_string());
                self.strikes(leaver, story == Story::LeaverLost, &mut rng);
            }
            Story::PrimaryDies => self.later(0, Script::CrashNode(cast.primary, Kept::All)),
            Story::PrimaryUntold => self.untold(cast.host, &mut rng),
            Story::PrimaryLost => {
                let long = rng.random_range(SEC..8 * SEC);
                self.later(0, Script::CrashHost(cast.host, Kept::All, long));
            }
            Story::ExchangedDies | Story::ExchangedLost => {
                let node = exchanged(&record);
                self.strikes(node, story == Story::ExchangedLost, &mut rng);
            }
            Story::ReplicaUntold => {
                let mut others = record.members.iter().filter(|m| m.node != record.primary);
                let node = exchanged(&record).or(others.next_back().map(|m| m.node.to_string()));
                let node = node.and_then(|name| self.nodes.iter().find(|n| n.name == name));
                if let Some(node) = node {
                    self.untold(node.host, &mut rng);
                }
            }
        }
    }

    /// A host's agent is gone for a moment, and a controller is behind meanwhile and after.
    fn untold(&self, host: usize, rng: &mut SmallRng) {
        let long = rng.random_range(20 * MS..1_500 * MS);
        self.later(0, Script::Crash(Party::Agent(host), long));
        let behind = Script::Lag(rng.random_range(0..self.shape.controllers), 5 * SEC);
        self.later(0, behind);
    }

    fn cast(&self, shard: usize) -> Option<(Shard, Cast)> {
        let record = self.shards().find(|s| s.index as usize == shard)?;
        let node = |name: &str| self.nodes.iter().find(|n| n.name == name);
        let primary = node(record.primary.as_str())?;
        let members = record.members.iter().filter(|m| m.node != record.primary);
        let replicas = members.filter_map(|m| Some(Party::Node(node(m.node.as_str())?.index)));
        let leader = self.controllers.iter().position(|c| c.believes().is_some());
        let leader = leader.unwrap_or(0);
        let cast = Cast {
            primary: primary.index,
            host: primary.host,
            replicas: replicas.collect(),
            peers: (0..self.shape.hosts)
                .filter(|h| *h != primary.host)
                .map(Party::Agent)
                .collect(),
            follower: (leader + 1) % self.shape.controllers,
            leader,
        };
        Some((record, cast))
    }

    fn later(&self, after: Micros, script: Script) {
        let mut ctx = self.ctx.borrow_mut();
        let at = ctx.now() + after;
        ctx.queue.at(at, Event::Script(script));
    }

    /// At the next such act.
    fn at_point(&self, point: Point, script: Script) {
        self.ctx.borrow_mut().points.push((point, 1, script));
    }

    /// Proxies, or the replicas, don't reach the primary any more.
    fn missed(&self, cast: &Cast, rng: &mut SmallRng, long: Micros) {
        let primary = [Party::Node(cast.primary)];
        let by = if rng.random_range(0..2) == 0 {
            both_ways(&primary, &cast.replicas)
        } else {
            let last = rng.random_range(1..=self.shape.proxies);
            let proxies: Vec<Party> = (0..last).map(Party::Proxy).collect();
            both_ways(&primary, &proxies)
        };
        self.later(0, Script::Cut(by, long));
    }

    /// A node's process dies, or its host is lost for a while.
    fn strikes(&self, name: Option<String>, whole_host: bool, rng: &mut SmallRng) {
        let node = name.and_then(|name| self.nodes.iter().find(|n| n.name == name));
        let Some(node) = node else { return };
        let long = rng.random_range(SEC..12 * SEC);
        self.later(
            0,
            match whole_host {
                true => Script::CrashHost(node.host, Kept::All, long),
                false => Script::CrashNode(node.index, Kept::All),
            },
        );
    }

    fn promised(&self, cast: &Cast, rng: &mut SmallRng) {
        let long = rng.random_range(5 * SEC..8 * SEC);
        self.later(0, Script::Cut(control(self.shape, cast.host), long));
        self.missed(cast, rng, long);
        let agent = [Party::Agent(cast.host)];
        let alone = Script::Cut(both_ways(&agent, &cast.peers), 4 * SEC);
        self.at_point(Point::Proven, alone);
    }

    fn hangs(&self, cast: &Cast, rng: &mut SmallRng) {
        let long = rng.random_range(700 * MS..2_000 * MS);
        self.later(0, Script::Stall(Party::Node(cast.primary), long));
        let untold = rng.random_range(2 * SEC..5 * SEC);
        let untold = Script::Cut(control(self.shape, cast.host), untold);
        self.at_point(Point::Lost, untold);
    }

    fn stale_return(&self, cast: &Cast, rng: &mut SmallRng) {
        let long = rng.random_range(3_600 * MS..5_000 * MS);
        let inside = (rng.random_range(0..2) == 0).then(|| rng.random_range(0..self.shape.proxies));
        self.later(0, Script::Cut(around(self.shape, cast.host, inside), long));
        let others: Vec<Party> = controllers(self.shape)
            .into_iter()
            .filter(|c| *c != Party::Controller(cast.follower))
            .collect();
        // Not at the same moment: the end of a cut is the end of all cuts between the same two.
        let still = Script::Cut(both_ways(&[Party::Agent(cast.host)], &others), 3 * SEC);
        self.later(long + 1, still);
        let behind = rng.random_range(2_500 * MS..3_000 * MS);
        self.later(behind, Script::Lag(cast.follower, 5 * SEC));
    }

    fn cut_twice(&self, cast: &Cast, rng: &mut SmallRng) {
        let inside = (rng.random_range(0..2) == 0).then(|| rng.random_range(0..self.shape.proxies));
        let around = around(self.shape, cast.host, inside);
        let (first, second) = (
            rng.random_range(2_800 * MS..4_200 * MS),
            rng.random_range(SEC..4 * SEC),
        );
        let between = rng.random_range(20 * MS..600 * MS);
        self.later(0, Script::Cut(around.clone(), first));
        self.later(first + between, Script::Cut(around, second));
    }

    fn store_out(&self, cast: &Cast, rng: &mut SmallRng) {
        let out = rng.random_range(2_500 * MS..4_000 * MS);
        self.later(0, Script::Elect(out));
        let cut = out.saturating_sub(rng.random_range(0..500 * MS));
        let long = rng.random_range(4 * SEC..6 * SEC);
        self.later(cut, Script::Cut(control(self.shape, cast.host), long));
        let host = [Party::Node(cast.primary)];
        let proxies: Vec<Party> = (0..self.shape.proxies).map(Party::Proxy).collect();
        self.later(cut, Script::Cut(both_ways(&host, &proxies), long));
        let still = rng.random_range(500 * MS..3_000 * MS);
        let stop = Script::Stall(Party::Controller(cast.leader), still);
        let point = [Point::Proven, Point::Chosen, Point::Confirmed];
        self.at_point(point[rng.random_range(0..point.len())], stop);
        let agent = [Party::Agent(cast.host)];
        let alone = Script::Cut(both_ways(&agent, &cast.peers), 4 * SEC);
        self.at_point(Point::Proven, alone);
    }
}

/// Whose process makes way for another engine.
fn exchanged(shard: &Shard) -> Option<String> {
    let member = shard.members.iter().find(|m| m.exchange.is_some());
    member.map(|m| m.node.to_string())
}

/// Serving, with every replica: whoever is lost now can be replaced.
fn is_whole(shard: &Shard) -> bool {
    let others = |m: &&slotmesh_topology::Member| m.node != shard.primary;
    shard.mode == Mode::Serving && shard.members.iter().filter(others).all(|m| m.in_sync)
}
