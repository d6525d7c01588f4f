//! Changes of proxies, as short stories.

use slotmesh_topology::{InstanceState, Mode};

use super::{
    story::{NAMES, NEW, Story, host_of, options},
    *,
};
use crate::spec::{Choice, State};

use ProxyPhase::{Back, Bake, Done, HandOver, Parked, Ready, RolledBack, Skipped};

fn is_as_before(story: &Story, name: &str) -> bool {
    let placement = story.placement(name);
    (placement.program.as_str(), placement.generation) == ("", 0)
}

#[test]
fn one_after_the_other_gets_the_program_and_is_watched_before_the_next() {
    let mut story = Story::new(&options());
    story.settle();
    assert_eq!(story.phases(), [Bake, Ready, Ready]);
    assert_eq!(story.placement("pa").program, NEW);
    assert!(is_as_before(&story, "pb") && is_as_before(&story, "pc"));
    story.pass(BAKE_MS - 1);
    assert_eq!(story.phases(), [Bake, Ready, Ready], "it is watched");
    story.pass(1);
    assert_eq!(story.phases(), [Done, Bake, Ready]);
    assert_eq!(story.finish(), State::Done);
    assert_eq!(story.handed_over(), NAMES);
    let part = story.part("pa");
    assert_eq!(
        (part.from_version.as_str(), part.to_version.as_str()),
        ("0.1.0", "0.2.0")
    );
    assert_eq!((part.clients, part.handover_us), (7, 1_500));
    assert!(story.task.message.starts_with("all 3 proxies run it"));
}

#[test]
fn a_canary_that_its_agent_can_not_hand_over_ends_it_and_nobody_else_is_touched() {
    let mut story = Story::new(&options());
    story.fails.insert(("pa", NEW));
    assert_eq!(story.finish(), State::RolledBack);
    assert_eq!(story.phases(), [RolledBack, RolledBack, RolledBack]);
    assert_eq!(story.handed_over(), ["pa"]);
    assert!(NAMES.iter().all(|name| is_as_before(&story, name)));
    assert!(
        story.task.message.contains("the sum is another one"),
        "{}",
        story.task.message
    );
    assert!(story.part("pb").message.starts_with("halted: proxy pa"));
    // The next try is another one for its agent.
    let again = story.plan(&options()).unwrap();
    story.task.spec = crate::Spec::Proxies(again.changes);
    story.task.state = State::Running;
    story.act();
    story.act();
    assert_eq!(story.placement("pa").generation, 2);
}

#[test]
fn a_bad_one_in_the_middle_goes_back_the_first_stays_and_a_retry_goes_on_with_the_rest() {
    let mut story = Story::new(&options());
    story.settle();
    story.fails.insert(("pb", NEW));
    assert_eq!(story.finish(), State::NeedsOperator);
    assert_eq!(story.phases(), [Done, RolledBack, RolledBack]);
    assert!(
        story.task.message.starts_with("1 of 3 proxies run it"),
        "{}",
        story.task.message
    );
    assert!(!story.task.is_parked(), "nothing waits: it has ended");
    assert_eq!(menu(&story.task), [Choice::Retry]);
    story.fails.clear();
    story.task = retried(story.task.clone(), story.stage.now_ms);
    assert_eq!(story.finish(), State::Done);
    assert_eq!(story.handed_over(), ["pa", "pb", "pb", "pc"]);
    assert_eq!(story.placement("pb").generation, 2);
}

#[test]
fn a_new_process_that_ends_while_it_is_watched_is_taken_back() {
    for ends in [
        |story: &mut Story| story.process("pa").pid = 99,
        |story: &mut Story| story.process("pa").state = ProcessState::Stopped,
        |story: &mut Story| story.process("pa").state = ProcessState::Failed,
    ] {
        let mut story = Story::new(&options());
        story.settle();
        ends(&mut story);
        story.act();
        assert_eq!(story.phases()[0], Back);
        assert!(
            is_as_before(&story, "pa"),
            "exactly what it ran: the spare is that"
        );
        assert_eq!(story.finish(), State::RolledBack);
    }
}

#[test]
fn a_new_process_with_more_errors_than_the_old_one_is_taken_back_and_others_are_not() {
    // Errors of the old one and the new one, of 1000 commands each.
    for (before, after, is_bad) in [
        (0, 9, false),
        (0, 11, true),
        (50, 109, false),
        (50, 111, true),
    ] {
        let mut story = Story::new(&options());
        let heard = story.heard("pa");
        (heard.commands, heard.errors) = (1_000, before);
        story.settle();
        let heard = story.heard("pa");
        (heard.commands, heard.errors) = (1_000, after);
        story.act();
        assert_eq!(story.phases()[0] == Back, is_bad, "{before} then {after}");
    }
    let mut story = Story::new(&options());
    story.settle();
    let heard = story.heard("pa");
    (heard.commands, heard.errors) = (COMMANDS_MIN - 1, 50);
    story.act();
    assert_eq!(story.phases()[0], Bake, "too few to say anything");
}

#[test]
fn a_new_process_that_alone_can_not_reach_a_primary_is_taken_back() {
    let mut story = Story::new(&options());
    story.settle();
    let epoch = story.stage.shard.epoch;
    let trouble = ("0".into(), (epoch, TROUBLE_MS_MAX));
    for name in ["pa", "pb", "pc"] {
        story.heard(name).troubles.extend([trouble.clone()]);
    }
    story.act();
    assert_eq!(
        story.phases()[0],
        Bake,
        "it is the primary that is in trouble"
    );
    story.heard("pb").troubles.clear();
    let spare = story.heard("pb").clone();
    story.heard("pb").troubles.extend([trouble]);
    story.stage.fleet.proxies.insert("pa.17".into(), spare);
    story.act();
    assert_eq!(
        story.phases()[0],
        Bake,
        "one that was relieved sees nothing"
    );
    story.heard("pb").troubles.clear();
    story.act();
    assert_eq!(story.phases()[0], Bake, "one without clients sees nothing");
    story.heard("pb").commands = 9;
    story.stage.node("a").unresponsive = true;
    story.act();
    assert_eq!(story.phases()[0], Bake, "its own agent says so");
    story.stage.node("a").unresponsive = false;
    story.act();
    assert_eq!(story.phases()[0], Back);
}

#[test]
fn no_proxy_is_touched_while_another_one_is_unwell_or_a_shard_does_not_serve() {
    let unwell: [fn(&mut Story); 6] = [
        |story| story.heard("pc").fresh = false,
        |story| {
            story.stage.fleet.proxies.remove(&"pc".into());
        },
        |story| story.process("pc").state = ProcessState::Failed,
        |story| story.heard("pc").shards.clear(),
        |story| {
            let handover = story.process("pc").handover.as_mut();
            handover.unwrap().is_under_way = true;
        },
        |story| story.stage.shard.mode = Mode::Fenced("why".into()),
    ];
    for (index, make) in unwell.into_iter().enumerate() {
        let mut story = Story::new(&options());
        story.idle.insert("pc");
        make(&mut story);
        story.settle();
        story.pass(OTHERS_MS_MAX - 1);
        assert_eq!(story.handed_over().len(), 0, "{index}");
        assert_eq!(story.task.state, State::Running, "{index}");
        // A mended one lets it go on.
        let mut mended = Story::new(&options());
        mended.settle();
        assert_eq!(mended.handed_over(), ["pa"]);
        story.pass(1);
        assert_eq!(story.task.state, State::RolledBack, "{index}");
        assert!(
            story.part("pa").message.contains("waited too long"),
            "{index}"
        );
    }
}

#[test]
fn a_failover_in_the_middle_of_a_hand_over_waits_for_nobody_and_the_next_proxy_for_it() {
    let mut story = Story::new(&options());
    story.settle();
    let lost = story.stage.shard.clone();
    story.stage.shard = lost.fail_over(&"f".into(), story.stage.now_ms).unwrap();
    story.pass(BAKE_MS);
    assert_eq!(
        story.phases(),
        [Bake, Ready, Ready],
        "nobody routes the next epoch yet"
    );
    story.stage.shard = lost;
    story.settle();
    assert_eq!(story.phases(), [Done, Bake, Ready]);
}

#[test]
fn one_whose_agent_is_away_is_skipped_and_named_and_the_others_go_on() {
    let mut story = Story::new(&options());
    story.stage.fleet.hosts.remove(&host_of("pa").into());
    story.settle();
    story.pass(UNFIT_MS_MAX - 1);
    assert_eq!(story.handed_over().len(), 0, "it may come back");
    story.pass(1);
    assert_eq!(story.phases()[0], Skipped);
    assert_eq!(story.finish(), State::NeedsOperator);
    assert_eq!(story.handed_over(), ["pb", "pc"]);
    assert!(
        story
            .task
            .message
            .contains("proxy pa (Skipped): the agent of host host-a")
    );
}

#[test]
fn an_agent_of_an_older_release_is_not_asked_and_if_all_are_it_is_refused() {
    let mut story = Story::before();
    story.process("pa").program = None;
    story.idle.insert("pa");
    let planned = story.plan(&options()).unwrap();
    assert!(
        planned
            .remarks
            .iter()
            .any(|r| r.contains("pa will be skipped"))
    );
    story.task.spec = crate::Spec::Proxies(planned.changes);
    story.settle();
    story.pass(UNFIT_MS_MAX);
    assert_eq!(story.phases()[0], Skipped);
    assert!(story.part("pa").message.contains("upgrade the agent first"));
    for name in NAMES {
        story.process(name).program = None;
    }
    assert_eq!(story.plan(&options()).unwrap_err().reason, "AGENTS_TOO_OLD");
}

#[test]
fn an_agent_that_dies_in_the_middle_is_waited_for_then_its_placement_goes_back() {
    let mut story = Story::new(&options());
    story.idle.insert("pa");
    story.settle();
    assert_eq!(story.phases()[0], HandOver);
    story.stage.fleet.hosts.remove(&host_of("pa").into());
    story.stage.fleet.proxy_processes.remove(&"pa".into());
    for _ in 0..2 {
        story.stage.now_ms += HANDOVER_MS_MAX;
        while story.act() {}
    }
    assert_eq!(story.phases()[0], RolledBack);
    assert!(is_as_before(&story, "pa"));
    assert!(story.part("pa").message.contains("when it returns"));
    assert_eq!(story.handed_over(), ["pa"]);
}

#[test]
fn a_leader_that_has_just_begun_takes_nobody_back_for_what_it_has_not_heard_yet() {
    let mut story = Story::new(&options());
    story.settle();
    let fleet = story.stage.fleet.clone();
    story.stage.fleet.proxies.clear();
    story.stage.fleet.proxy_processes.clear();
    story.stage.fleet.hosts.clear();
    story.stage.now_ms += BAKE_MS + SETTLE_MS_MAX - 1;
    assert!(!story.act(), "{:?}", story.events);
    let silent = std::mem::replace(&mut story.stage.fleet, fleet);
    story.act();
    assert_eq!(story.phases()[0], Done);
    // One that stays silent is not called well.
    let mut story = Story::new(&options());
    story.settle();
    story.stage.fleet = silent;
    story.stage.now_ms += BAKE_MS + SETTLE_MS_MAX;
    story.act();
    assert_eq!(story.phases()[0], Back);
}

#[test]
fn a_cancel_takes_the_one_under_way_back_and_leaves_what_is_done() {
    let mut story = Story::new(&options());
    story.task.cancel_requested = true;
    assert_eq!(story.finish(), State::Cancelled);
    assert_eq!(story.handed_over().len(), 0);
    for phase in [HandOver, Bake] {
        let mut story = Story::new(&options());
        if phase == HandOver {
            story.idle.insert("pb");
        }
        story.settle();
        story.pass(BAKE_MS);
        assert_eq!(story.phases(), [Done, phase, Ready]);
        assert!(story.task.is_cancellable());
        story.task.cancel_requested = true;
        story.idle.clear();
        assert_eq!(story.finish(), State::NeedsOperator);
        assert_eq!(story.phases(), [Done, RolledBack, RolledBack]);
        assert!(is_as_before(&story, "pb") && story.placement("pa").program == NEW);
        assert!(story.part("pb").on_request);
    }
}

#[test]
fn a_pause_holds_the_next_one_back_and_an_operator_may_end_a_bake() {
    let mut story = Story::new(&options());
    story.settle();
    let say = |story: &mut Story, choice| {
        assert!(menu(&story.task).contains(&choice), "{choice:?}");
        story.task = resolved(&story.task, choice, story.stage.now_ms);
        story.settle();
    };
    say(&mut story, Choice::Pause);
    say(&mut story, Choice::Finalize);
    assert_eq!(story.phases(), [Done, Ready, Ready]);
    story.pass(10 * BAKE_MS);
    assert_eq!(story.handed_over(), ["pa"]);
    say(&mut story, Choice::Resume);
    assert_eq!(story.handed_over(), ["pa", "pb"]);
    let undone = resolved(&story.task, Choice::Undo, 0);
    assert_eq!(
        undone, story.task,
        "what is not on the menu changes nothing"
    );
}

#[test]
fn each_begins_at_its_time_and_in_the_window_only() {
    let mut story = Story::new(&options());
    story.task.not_before_ms = story.stage.now_ms + 1_000;
    story.settle();
    assert_eq!(story.handed_over().len(), 0);
    let planned_ms = |task| crate::schedule::planned_ms(task, "", story.stage.now_ms, 0);
    assert_eq!(planned_ms(&story.task), Some(story.task.not_before_ms));
    story.opens_ms = Some(story.stage.now_ms + 5_000);
    story.pass(1_000);
    assert_eq!(story.handed_over().len(), 0, "the window is closed");
    assert!(story.part("pa").message.contains("maintenance window"));
    story.opens_ms = None;
    story.settle();
    assert_eq!(story.phases(), [Bake, Ready, Ready]);
    // It closes meanwhile: what has begun is brought to its end, nothing else begins.
    story.opens_ms = Some(u64::MAX);
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Done, Ready, Ready]);
}

#[test]
fn the_named_ones_are_changed_in_their_order_and_no_others() {
    let named = |names: &[&str]| Options {
        proxies: names.iter().map(|n| (*n).to_owned()).collect(),
        ..options()
    };
    let mut story = Story::new(&named(&["pc", "pa"]));
    assert_eq!(story.finish(), State::Done);
    assert_eq!(story.handed_over(), ["pc", "pa"]);
    assert!(is_as_before(&story, "pb"));
    for (names, reason) in [
        (&["pa", "px"][..], "PROXY_NOT_FOUND"),
        (&["pa", "pa"][..], "PROXY_TWICE"),
    ] {
        assert_eq!(story.plan(&named(names)).unwrap_err().reason, reason);
    }
    let restart = Options {
        program: None,
        ..options()
    };
    assert_eq!(story.plan(&restart).unwrap_err().reason, "PROXIES_MISSING");
    let long = Options {
        bake_ms: BAKE_MS_MAX + 1,
        ..options()
    };
    assert_eq!(story.plan(&long).unwrap_err().reason, "BAKE_INVALID");
    story.instance.state = InstanceState::Creating;
    assert_eq!(
        story.plan(&options()).unwrap_err().reason,
        "INSTANCE_NOT_RUNNING"
    );
}

#[test]
fn what_runs_already_is_left_alone() {
    let mut story = Story::new(&options());
    assert_eq!(story.finish(), State::Done);
    assert!(story.plan(&options()).unwrap().nothing_to_do);
    // One that should run it, and does not, is brought there.
    story.start("pb", "", 0);
    let planned = story.plan(&options()).unwrap();
    assert!(!planned.nothing_to_do);
    let phases: Vec<_> = planned.changes.proxies.iter().map(|p| p.phase).collect();
    assert_eq!(phases, [Done, Ready, Done]);
}

#[test]
fn a_restart_keeps_the_program_and_a_bad_one_goes_back_to_the_process_of_before() {
    let restart = Options {
        program: None,
        proxies: vec!["pb".into()],
        ..options()
    };
    let mut story = Story::new(&restart);
    assert_eq!(story.task.spec.kind(), "RestartProxy");
    // It serves nobody any more: that is what a restart is for.
    story.heard("pb").fresh = false;
    assert_eq!(story.finish(), State::Done);
    let placement = story.placement("pb");
    assert_eq!((placement.program.as_str(), placement.generation), ("", 1));
    let mut story = Story::new(&restart);
    story.settle();
    story.process("pb").pid = 99;
    assert_eq!(story.finish(), State::RolledBack);
    assert!(is_as_before(&story, "pb"));
    assert_eq!(
        story.placement("pb").generations,
        1,
        "its number is not given again"
    );
}

#[test]
fn a_restart_gives_other_workers_and_a_bad_one_has_those_of_before() {
    let wide = |workers| Options {
        program: None,
        proxies: vec!["pb".into()],
        workers,
        ..options()
    };
    let workers = |story: &Story| {
        let placement = story.placement("pb");
        slotmesh_topology::assignment::proxy(&story.instance, placement).workers
    };
    let mut story = Story::new(&wide(3));
    let before = workers(&story);
    assert_ne!(before, 3);
    assert_eq!(story.finish(), State::Done);
    assert_eq!(workers(&story), 3);
    let planned = story.plan(&wide(0)).unwrap();
    story.task.spec = crate::Spec::Proxies(planned.changes);
    story.task.state = State::Running;
    assert_eq!(story.finish(), State::Done);
    assert_eq!(workers(&story), 3, "a restart leaves them as they are");
    let mut story = Story::new(&wide(3));
    story.settle();
    assert_eq!(workers(&story), 3);
    story.process("pb").pid = 99;
    assert_eq!(story.finish(), State::RolledBack);
    assert_eq!(workers(&story), before);
    let refused = Story::before().plan(&wide(65)).unwrap_err();
    assert_eq!(refused.reason, "WORKERS_INVALID");
}

#[test]
fn one_that_can_not_go_back_waits_for_an_operator_who_tries_again_or_leaves_it() {
    let parked = || {
        let mut story = Story::new(&options());
        story.settle();
        story.fails.insert(("pa", ""));
        story.task.cancel_requested = true;
        story.settle();
        assert_eq!(story.phases(), [Parked, RolledBack, RolledBack]);
        assert!(story.task.is_parked() && !story.task.is_cancellable());
        assert_eq!(menu(&story.task), [Choice::Retry, Choice::Finalize]);
        story
    };
    let mut story = parked();
    story.fails.clear();
    story.task = resolved(&story.task, Choice::Retry, story.stage.now_ms);
    story.settle();
    assert_eq!(story.phases()[0], RolledBack);
    assert_eq!(story.placement("pa").program, "");
    assert_eq!(
        story.placement("pa").generation,
        2,
        "the first number has failed"
    );
    let mut story = parked();
    story.task = resolved(&story.task, Choice::Finalize, story.stage.now_ms);
    story.settle();
    assert!(story.task.state.is_ended() && !story.task.is_parked());
    let placement = story.placement("pa");
    assert_eq!((placement.program.as_str(), placement.generation), (NEW, 1));
}

#[test]
fn an_instance_that_is_removed_meanwhile_ends_it() {
    let mut story = Story::new(&options());
    story.settle();
    story.instance.state = InstanceState::Deleting;
    story.settle();
    assert!(story.task.state.is_ended(), "{:?}", story.phases());
    let mut story = Story::new(&options());
    story.instance.proxies.remove(1);
    story.stage.fleet.proxies.remove(&"pb".into());
    assert_eq!(story.finish(), State::NeedsOperator);
    assert_eq!(story.phases(), [Done, Skipped, Done]);
}
