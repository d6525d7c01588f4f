//! PSYNC, from both sides: who may follow, from where, and what a refusal does to a FAILOVER.
//!
//! Invariant: a replica goes on from an offset only within the same history.

use rand::Rng;

use super::{Node, party_of};
use crate::{
    ctx::Ctx,
    engine,
    msg::{ConnId, Stream},
    plan::Point,
    redis::{Follower, LinkState, Process, Psync, PsyncAnswer},
    sched::MS,
};

impl Node {
    pub(super) fn psync(&mut self, ctx: &mut Ctx, p: &mut Process, conn: ConnId, ask: &Psync) {
        let me = self.party();
        let answer = |ctx: &mut Ctx, answer| ctx.send(me, conn, Stream::PsyncAnswer(answer));
        if p.loading_until > ctx.now() || !p.admits(&ask.user, &ask.password, true) {
            return answer(ctx, PsyncAnswer::WrongPass);
        }
        if ask.failover {
            if p.is_primary() {
                return answer(ctx, PsyncAnswer::Err("FAILOVER can't be sent to a master"));
            }
            if ask.replid != p.replid {
                return answer(
                    ctx,
                    PsyncAnswer::Err("FAILOVER replid must match my replid"),
                );
            }
            self.become_primary(ctx, p);
            ctx.point(Point::Promoted);
        }
        if !p.is_primary() && p.link != LinkState::Up {
            return answer(ctx, PsyncAnswer::Err("NOMASTERLINK"));
        }
        ctx.checks.feeds(self.shard, &self.name, &p.run_id);
        p.clients
            .entry(conn)
            .or_default()
            .user
            .clone_from(&ask.user);
        let goes_on = p.can_continue(ask.replid, ask.offset);
        let follower = Follower {
            address: ask.address.clone(),
            user: ask.user.clone(),
            ack: if goes_on { ask.offset } else { 0 },
            online: goes_on,
            heard: ctx.now(),
        };
        p.followers.insert(conn, follower);
        ctx.say(|| format!("{} feeds {} (partial {goes_on})", self.name, ask.address));
        if goes_on {
            answer(ctx, PsyncAnswer::Continue { replid: p.replid });
            let ops = p.since(ask.offset);
            if !ops.is_empty() {
                ctx.send(
                    me,
                    conn,
                    Stream::Feed {
                        offset: ask.offset,
                        ops,
                    },
                );
            }
        } else {
            p.sync_full += 1;
            let copy = PsyncAnswer::Full {
                replid: p.replid,
                offset: p.offset(),
                log: p.log.clone(),
                format: engine::format(&p.engine),
            };
            answer(ctx, copy);
        }
    }

    pub(super) fn psync_answered(
        &mut self,
        ctx: &mut Ctx,
        p: &mut Process,
        conn: ConnId,
        got: PsyncAnswer,
    ) {
        p.link_heard = ctx.now();
        match got {
            PsyncAnswer::WrongPass => self.link_lost(ctx, p, conn),
            PsyncAnswer::Err(why) => {
                if p.failover.as_ref().is_some_and(|f| f.in_progress) && why != "NOMASTERLINK" {
                    ctx.say(|| format!("{}: target refused: {why}", self.name));
                    self.end_failover(ctx, p, true);
                } else {
                    self.link_lost(ctx, p, conn);
                }
            }
            PsyncAnswer::Continue { replid } => {
                p.link = LinkState::Up;
                if replid != p.replid {
                    p.replid2 = p.replid;
                    p.second_offset = p.offset();
                    p.replid = replid;
                    self.drop_followers(ctx, p);
                }
                self.end_failover(ctx, p, false);
                self.ack(ctx, p);
            }
            PsyncAnswer::Full {
                replid,
                offset,
                log,
                format,
            } => {
                ctx.checks.replaced(&self.name, p, &log);
                p.led = false;
                p.loaded = 0;
                self.drop_followers(ctx, p);
                if format > engine::format(&p.engine) {
                    // It has removed what it had by the time at which it sees that.
                    ctx.say(|| format!("{} can't load its primary's copy", self.name));
                    let replid = ctx.call();
                    p.load(replid, 0, Vec::new());
                    self.link_lost(ctx, p, conn);
                } else {
                    p.load(replid, offset, log);
                    ctx.checks.is_whole(&p.run_id);
                    p.link = LinkState::Loading;
                    p.loading_until = ctx.now() + ctx.rng.random_range(2 * MS..60 * MS);
                }
                self.end_failover(ctx, p, false);
            }
        }
    }

    /// Asks the primary for its stream.
    pub(super) fn connect(&mut self, ctx: &mut Ctx, p: &mut Process) {
        let Some(master) = p.following.clone() else {
            return;
        };
        let Some(to) = party_of(&master) else { return };
        let conn = ctx.open(self.party(), to);
        p.link_conn = Some(conn);
        p.link = LinkState::Asked;
        let psync = Psync {
            user: p.login.0.clone(),
            password: p.login.1.clone(),
            address: p.address.clone(),
            replid: p.replid,
            offset: p.offset(),
            failover: p.failover.as_ref().is_some_and(|f| f.in_progress),
        };
        if psync.failover {
            ctx.point(Point::AskedToTakeOver);
        }
        ctx.send(self.party(), conn, Stream::Psync(psync));
    }
}
