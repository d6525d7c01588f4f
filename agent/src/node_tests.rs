//! One row a rule: what is assigned, what is seen, what is done.

use std::fmt::Write;

use super::*;
use crate::{capture::tail::History, fence::KnownUser};

/// A world in which the node is the converged primary of epoch 3; tests change one thing.
struct World {
    assigned: Assigned,
    role: Role,
    failover: Failover,
    following: String,
    link: Link,
    replid: &'static str,
    offset: u64,
    captured: bool,
    users: KnownUsers,
    login: Option<Login>,
    fence: Option<FenceMark>,
    standing: Option<Standing>,
    target_online: bool,
    journaled_epoch: u64,
    serving_right: bool,
}

fn user(name: &str, epoch: u64) -> EpochUser {
    EpochUser {
        name: name.to_owned(),
        password: "p".to_owned(),
        epoch,
        replication: name.starts_with("rp"),
    }
}

fn known(full: bool) -> KnownUser {
    KnownUser {
        password_sha256: password_sha256("p"),
        full,
        current: full,
    }
}

fn login(epoch: u64) -> Login {
    Login {
        user: format!("rp-{epoch}-a"),
        password: "m".to_owned(),
    }
}

impl World {
    fn primary() -> Self {
        let spec = NodeSpec {
            epoch: 3,
            run_id: "run".to_owned(),
            role: NodeRole::Primary.into(),
            closed_epoch: 2,
            users: vec![user("px-3", 3), user("rp-3-b", 3)],
            master_user: login(3).user,
            master_password: login(3).password,
            ..NodeSpec::default()
        };
        let users = [("px-3", true), ("rp-3-b", false)];
        Self {
            assigned: Assigned {
                term: 5,
                revision: 100,
                spec,
            },
            role: Role::Primary,
            failover: Failover::None,
            following: String::new(),
            link: Link::Down,
            replid: "r0",
            offset: 500,
            captured: false,
            users: users
                .map(|(name, full)| (name.to_owned(), known(full)))
                .into(),
            login: Some(login(3)),
            fence: None,
            standing: None,
            target_online: false,
            journaled_epoch: 3,
            serving_right: true,
        }
    }

    /// The converged replica of `n:1` at epoch 3.
    fn replica() -> Self {
        let mut world = Self::primary();
        world.assigned.spec.role = NodeRole::Replica.into();
        world.assigned.spec.primary_address = "n:1".to_owned();
        world.assigned.spec.users.remove(0);
        world.users.remove("px-3");
        world.role = Role::Replica;
        world.following = "n:1".to_owned();
        world.link = Link::Up;
        world
    }

    fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    fn decide(&self) -> String {
        let seen = Observed {
            run_id: "run",
            role: self.role,
            failover: self.failover,
            following: &self.following,
            link: self.link,
            history: History {
                replid: self.replid,
                offset: self.offset,
                ..History::default()
            },
            captured: self.captured,
            users: &self.users,
            login: self.login.as_ref(),
            fence: self.fence.as_ref(),
            fence_target_online: self.target_online,
            standing: self.standing.as_ref(),
            journaled_epoch: self.journaled_epoch,
            serving_right: self.serving_right,
        };
        let mut text = String::new();
        match decide(&self.assigned, &seen) {
            Decision::Leave(why) => write!(text, "leave: {why}").unwrap(),
            Decision::Act(actions) => {
                for action in actions {
                    let word = match action {
                        Action::Delete(users) => format!("delete {}", users.join(" ")),
                        Action::SoftFence(user) => format!("fence {user}"),
                        Action::SetLogin(login) => format!("login {}", login.user),
                        Action::Detach => "detach".to_owned(),
                        Action::Capture { replid, tail } => {
                            format!("capture {replid} {}", tail.from)
                        }
                        Action::Follow { host, port } => format!("follow {host}:{port}"),
                        Action::Grant(user) => format!("grant {}", user.name),
                    };
                    write!(text, "{word}; ").unwrap();
                }
            }
        }
        text.trim_end_matches("; ").to_owned()
    }
}

fn check(world: World, expected: &str) {
    assert_eq!(world.decide(), expected);
}

#[test]
fn a_converged_node_is_left_alone() {
    check(World::primary(), "");
    check(World::replica(), "");
}

#[test]
fn nobody_is_given_anything_at_a_primary_whose_host_has_no_right_to_serve() {
    let bare = |w: &mut World| w.users.clear();
    let world = World::primary().with(bare);
    check(world.with(|w| w.serving_right = false), "");
    check(World::primary().with(bare), "grant px-3; grant rp-3-b");
}

#[test]
fn nothing_is_done_without_an_epoch_a_named_process_or_a_fresh_assignment() {
    let bare = |w: &mut World| w.users.clear();
    check(
        World::primary()
            .with(bare)
            .with(|w| w.assigned.spec.epoch = 0),
        "leave: ",
    );
    let other = |w: &mut World| w.assigned.spec.run_id = "other".to_owned();
    check(
        World::primary().with(bare).with(other),
        &format!("leave: {UNNAMED}"),
    );
    let unnamed = |w: &mut World| w.assigned.spec.run_id.clear();
    check(
        World::primary().with(bare).with(unnamed),
        &format!("leave: {UNNAMED}"),
    );
    check(
        World::primary().with(bare).with(|w| w.journaled_epoch = 4),
        &format!("leave: {STALE}"),
    );
    check(
        World::primary()
            .with(bare)
            .with(|w| w.assigned.spec.frozen = true),
        &format!("leave: {FROZEN}"),
    );
}

#[test]
fn a_primary_gets_its_users_and_login() {
    check(
        World::primary().with(|w| {
            w.users.clear();
            w.login = None;
        }),
        "login rp-3-a; grant px-3; grant rp-3-b",
    );
}

#[test]
fn a_user_with_another_password_is_made_anew() {
    check(
        World::primary().with(|w| w.assigned.spec.users[1].password = "q".to_owned()),
        "grant rp-3-b",
    );
}

#[test]
fn proxy_rights_are_for_a_primary_of_exactly_this_epoch() {
    let foreign = |name: &'static str, epoch| {
        World::primary().with(move |w| w.assigned.spec.users.push(user(name, epoch)))
    };
    check(foreign("px-4", 4), "");
    // A name that does not say what the fields say.
    check(foreign("px-4", 3), "");
    check(foreign("default", 3), "");
    check(
        World::replica().with(|w| w.assigned.spec.users.push(user("px-3", 3))),
        "",
    );
    check(
        World::primary().with(|w| {
            w.users.remove("px-3");
            w.failover = Failover::WaitingForSync;
        }),
        "",
    );
}

#[test]
fn rights_of_other_epochs_are_taken_and_closed_epochs_deleted_first() {
    check(
        World::primary().with(|w| {
            w.users.clear();
            w.users.insert("px-2".to_owned(), known(true));
            w.users.insert("rp-1-b".to_owned(), known(false));
            w.users.insert("px-4".to_owned(), known(true));
        }),
        "fence px-4; delete px-2 rp-1-b; grant px-3; grant rp-3-b",
    );
}

#[test]
fn an_old_primary_is_fenced_before_it_follows() {
    check(
        World::replica().with(|w| {
            w.assigned.spec.epoch = 4;
            w.assigned.spec.master_user = login(4).user;
            w.role = Role::Primary;
            w.following.clear();
            w.users.insert("px-3".to_owned(), known(true));
            w.standing = Some(standing(3, 0));
        }),
        "fence px-3; login rp-4-a; follow n:1",
    );
}

#[test]
fn a_replica_follows_the_primary_of_the_record() {
    check(
        World::replica().with(|w| w.following = "o:2".to_owned()),
        "follow n:1",
    );
    check(
        World::replica().with(|w| {
            w.role = Role::Primary;
            w.following.clear();
        }),
        "follow n:1",
    );
}

#[test]
fn a_replica_is_never_promoted() {
    check(
        World::primary().with(|w| {
            w.role = Role::Replica;
            w.login = None;
        }),
        &format!("leave: {NOT_PROMOTED}"),
    );
}

fn standing(epoch: u64, frozen_revision: u64) -> Standing {
    Standing {
        node_id: "a".to_owned(),
        run_id: "run".to_owned(),
        epoch,
        frozen_revision,
        membership: 0,
    }
}

#[test]
fn who_has_left_is_not_let_in_again_by_an_assignment_of_before() {
    let decided = |of_record: u64, epoch: u64, run_id: &str| {
        let mut w = World::primary();
        w.assigned.spec.membership = of_record;
        w.standing = Some(Standing {
            membership: 7,
            run_id: run_id.to_owned(),
            ..standing(epoch, 0)
        });
        w.decide()
    };
    assert_eq!(decided(6, 3, "run"), format!("leave: {STALE}"));
    for (of_record, epoch, run_id) in [(7, 3, "run"), (6, 2, "run"), (6, 3, "another")] {
        assert_ne!(decided(of_record, epoch, run_id), format!("leave: {STALE}"));
    }
}

#[test]
fn a_target_promoted_meanwhile_is_demoted_only_by_an_assignment_newer_than_the_freeze() {
    let promoted = |stood: Standing| {
        World::replica().with(|w| {
            w.role = Role::Primary;
            w.following.clear();
            w.standing = Some(stood);
        })
    };
    check(promoted(standing(3, 0)), &format!("leave: {NOT_DEMOTED}"));
    check(promoted(standing(3, 100)), &format!("leave: {NOT_DEMOTED}"));
    check(promoted(standing(3, 99)), "follow n:1");
    check(promoted(standing(2, 0)), "follow n:1");
    let mut earlier_process = standing(3, 0);
    earlier_process.run_id = "earlier".to_owned();
    check(promoted(earlier_process), "follow n:1");
}

fn fence_mark(frozen_revision: u64) -> FenceMark {
    FenceMark {
        node_id: "a".to_owned(),
        run_id: "run".to_owned(),
        epoch: 3,
        term: 5,
        target_address: "n:1".to_owned(),
        frozen_revision,
    }
}

#[test]
fn a_hand_overs_fence_is_lifted_only_with_proof_that_it_was_undone() {
    let fenced = |mark: FenceMark| {
        World::primary().with(|w| {
            w.users.insert("px-3".to_owned(), known(false));
            w.fence = Some(mark);
        })
    };
    check(fenced(fence_mark(0)), "");
    check(fenced(fence_mark(100)), "");
    check(fenced(fence_mark(99)), "grant px-3");
    check(
        fenced(fence_mark(0)).with(|w| w.target_online = true),
        "grant px-3",
    );
    check(fenced(fence_mark(99)).with(|w| w.assigned.term = 4), "");
    let of_another_epoch = |w: &mut World| w.fence.as_mut().unwrap().epoch = 2;
    check(fenced(fence_mark(0)).with(of_another_epoch), "grant px-3");
}

/// A failover was declared: epoch 4 has begun and nobody has it.
fn lost(world: &mut World) {
    let spec = &mut world.assigned.spec;
    (spec.epoch, spec.closed_epoch, spec.detached) = (4, 3, true);
    spec.role = NodeRole::Replica.into();
    (spec.primary_address, spec.users) = (String::new(), vec![]);
    (spec.master_user, spec.master_password) = (String::new(), String::new());
}

#[test]
fn a_detached_replica_first_takes_the_rights_of_the_lost_epoch_then_breaks_its_link_for_good() {
    let detaching = World::replica().with(lost);
    check(detaching, "delete rp-3-b; detach");
    let bare = |w: &mut World| w.users.clear();
    for (link, following) in [(Link::Down, "n:1"), (Link::Syncing, NOWHERE)] {
        let half = |w: &mut World| (w.link, w.following) = (link, following.to_owned());
        check(World::replica().with(lost).with(bare).with(half), "detach");
    }
    // An agent that has just started does not know the login; it does not matter.
    for login in [None, Some(Login::default())] {
        let cut = |w: &mut World| {
            (w.link, w.login) = (Link::Down, login);
            w.following = NOWHERE.to_owned();
        };
        check(World::replica().with(lost).with(bare).with(cut), "");
    }
}

#[test]
fn a_lost_primary_is_only_fenced_and_one_that_was_promoted_is_not_demoted() {
    check(World::primary().with(lost), "delete px-3 rp-3-b");
    let promoted = |w: &mut World| {
        w.users.clear();
        w.role = Role::Primary;
        w.login = Some(Login::default());
    };
    check(World::replica().with(lost).with(promoted), "");
}

#[test]
fn a_failover_that_went_to_another_one_makes_a_replica_of_whoever_was_promoted_before() {
    let served = |w: &mut World| {
        w.assigned.spec.epoch = 4;
        w.assigned.spec.closed_epoch = 3;
        w.assigned.spec.users = vec![];
        w.users.clear();
        w.role = Role::Primary;
        // It agreed with the record as a replica of epoch 3; never in the failover.
        w.standing = Some(Standing {
            node_id: "a".to_owned(),
            run_id: "run".to_owned(),
            epoch: 3,
            frozen_revision: 0,
            membership: 0,
        });
        w.following = String::new();
    };
    check(World::replica().with(served), "follow n:1");
}

#[test]
fn a_lost_primary_keeps_what_only_it_has_before_it_follows_and_once() {
    let back = |w: &mut World| {
        w.role = Role::Primary;
        w.following = String::new();
        w.assigned.spec.previous_replid = "r0".to_owned();
        w.assigned.spec.previous_offset = 401;
    };
    let returned = || World::replica().with(back);
    check(returned(), "capture r0 401; follow n:1");
    check(
        returned().with(|w| w.offset = 401),
        "capture r0 401; follow n:1",
    );
    for nothing_beyond in [
        (|w: &mut World| w.offset = 400) as fn(&mut World),
        |w| w.captured = true,
        |w| w.replid = "r1",
        |w| w.assigned.spec.previous_replid = String::new(),
    ] {
        check(returned().with(nothing_beyond), "follow n:1");
    }
}

#[test]
fn a_replica_that_the_record_does_not_name_is_fed_no_more() {
    let feeds = |name: &'static str| {
        World::primary().with(move |w| {
            w.users.insert(name.to_owned(), known(false));
        })
    };
    check(feeds("rp-3-c"), "delete rp-3-c");
    // Made ahead of the next epoch.
    check(feeds("rp-4-c"), "");
    check(
        feeds("rp-3-c").with(|w| w.assigned.spec.frozen = true),
        "leave: a hand-over is under way",
    );
}

#[test]
fn a_node_that_has_left_keeps_what_only_it_has_before_it_is_removed() {
    let left = || {
        World::primary().with(|w| {
            w.assigned.spec = NodeSpec {
                epoch: 4,
                closed_epoch: 4,
                role: NodeRole::Replica.into(),
                detached: true,
                previous_replid: "r0".to_owned(),
                previous_offset: 401,
                ..NodeSpec::default()
            };
            w.assigned.spec.set_desired(Desired::Removed);
        })
    };
    check(left(), "capture r0 401");
    check(left().with(|w| w.captured = true), "");
    check(left().with(|w| w.role = Role::Replica), "");
}
