//! A proxy that is built anew on another host, as short stories.

use super::{
    super::{
        story::{Story, options},
        *,
    },
    TOLD_MS,
};
use crate::spec::{Choice, State};

use ProxyPhase::{Back, Bake, Build, Check, Done, Drain, Parked, Ready, RolledBack, Skipped};

fn rebuild(proxies: &[&str]) -> Options {
    Options {
        program: None,
        proxies: proxies.iter().map(|p| (*p).to_owned()).collect(),
        rebuild: Some(Rebuild {
            host: None,
            drain_ms: DRAIN_MS,
        }),
        ..options()
    }
}

/// Three proxies, and two hosts without one.
fn before() -> Story {
    let mut story = Story::before();
    for host in ["host-x", "host-y"] {
        story.stage.fleet.hosts.insert(host.into());
    }
    story
}

fn begun(options: &Options) -> Story {
    let mut story = before();
    let planned = story.plan(options).unwrap();
    story.task.spec = crate::Spec::Proxies(planned.changes);
    story
}

/// Ids of an instance's proxies, with their hosts.
fn placed(story: &Story) -> Vec<(String, String)> {
    let all = story.instance.proxies.iter();
    all.map(|p| (p.proxy.to_string(), p.host.to_string()))
        .collect()
}

fn names(story: &Story) -> Vec<String> {
    placed(story).into_iter().map(|(name, _)| name).collect()
}

const NEW: &str = "r-proxy-0";

#[test]
fn a_successor_serves_and_is_watched_before_clients_are_sent_there_and_the_old_one_goes_last() {
    let mut story = begun(&rebuild(&["pa"]));
    story.stays = true;
    assert_eq!(story.task.spec.kind(), "RestartProxy");
    story.settle();
    assert_eq!(story.phases(), [Bake]);
    assert_eq!(story.placement(NEW).host.as_str(), "host-x");
    story.pass(BAKE_MS - 1);
    assert_eq!(story.placement("pa").leaving, None, "not before its bake");
    story.pass(1);
    assert_eq!(story.phases(), [Drain]);
    let leaving = story.placement("pa").leaving.clone().unwrap();
    assert_eq!(leaving.endpoint, "r-proxy-0:6379");
    assert_eq!(leaving.until_unix_ms, story.stage.now_ms + DRAIN_MS);
    story.pass(DRAIN_MS / 2);
    assert_eq!(names(&story), ["pa", "pb", "pc", NEW], "it has clients");
    assert!(!story.task.is_cancellable(), "its clients are on their way");
    story.stays = false;
    assert_eq!(story.finish(), State::Done);
    assert_eq!(names(&story), ["pb", "pc", NEW]);
    assert_eq!(story.instance.gone_proxies[0].proxy.as_str(), "pa");
    let message = &story.part("pa").message;
    assert!(message.contains("r-proxy-0 on host-x"), "{message}");
    assert!(story.task.message.contains("on another host"));
}

#[test]
fn who_does_not_go_is_closed_when_the_time_is_over() {
    let mut story = begun(&rebuild(&["pa"]));
    story.stays = true;
    story.settle();
    story.pass(BAKE_MS);
    story.pass(DRAIN_MS - 1);
    assert_eq!(story.phases(), [Drain]);
    story.pass(1);
    assert_eq!(story.phases(), [Done]);
    assert!(story.part("pa").message.contains("time"));
}

#[test]
fn one_after_the_other_and_the_host_that_one_leaves_is_free_for_the_next() {
    let mut story = before();
    story.stage.fleet.hosts.remove(&"host-y".into());
    let planned = story.plan(&rebuild(&["pa", "pb"])).unwrap();
    assert_eq!(planned.to_hosts, ["host-x".into(), "host-a".into()]);
    story.task.spec = crate::Spec::Proxies(planned.changes);
    assert_eq!(story.finish(), State::Done);
    let (one, two) = ("r-proxy-0".to_owned(), "r-proxy-1".to_owned());
    assert_eq!(
        placed(&story)[1..],
        [(one, "host-x".to_owned()), (two, "host-a".to_owned())]
    );
    assert_eq!(story.instance.gone_proxies.len(), 2);
}

#[test]
fn the_program_of_before_runs_there_and_an_id_is_never_given_twice() {
    let mut story = begun(&rebuild(&["pa"]));
    let placements = story.instance.proxies.iter_mut();
    for one in placements.filter(|p| p.proxy.as_str() == "pa") {
        one.program = "proxy-0.2.0".into();
    }
    story.fails.insert((NEW, ""));
    story.settle();
    story.pass(AWAY_MS_MAX);
    assert_eq!(story.phases(), [RolledBack]);
    assert_eq!(names(&story), ["pa", "pb", "pc"]);
    assert!(story.task.message.contains("the sum is another one"));
    assert_eq!(story.placement("pa").leaving, None);
    assert_eq!(story.task.state, State::RolledBack);
    // Its agent has removed it since.
    story.instance = story.instance.without_removed(|_| true);
    story.task = retried(story.task.clone(), story.stage.now_ms);
    assert_eq!(story.finish(), State::Done);
    assert_eq!(names(&story), ["pb", "pc", "r-proxy-1"]);
    assert_eq!(story.placement("r-proxy-1").program, "proxy-0.2.0");
}

#[test]
fn a_host_that_is_lost_before_the_drain_changes_nothing() {
    for bakes in [false, true] {
        let mut story = begun(&rebuild(&["pa"]));
        if !bakes {
            story.idle.insert(NEW);
        }
        story.settle();
        assert_eq!(story.phases(), [if bakes { Bake } else { Build }]);
        story.lose("host-x");
        story.settle();
        story.pass(AWAY_MS_MAX);
        story.pass(AWAY_MS_MAX);
        assert_eq!(story.phases(), [RolledBack], "{:?}", story.events);
        assert_eq!(names(&story), ["pa", "pb", "pc"]);
        assert_eq!(story.placement("pa").leaving, None);
        assert_eq!(story.instance.gone_proxies[0].proxy.as_str(), NEW);
    }
}

#[test]
fn one_of_a_lost_host_is_built_anew_and_nobody_is_waited_for_in_its_drain() {
    let mut story = before();
    story.lose("host-a");
    let planned = story.plan(&rebuild(&["pa"])).unwrap();
    story.task.spec = crate::Spec::Proxies(planned.changes);
    // Neither are the others of that host.
    story.heard("pb").fresh = false;
    story.settle();
    assert_eq!(story.phases(), [Bake], "{:?}", story.events);
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Drain]);
    story.pass(SILENT_MS_MAX - 1);
    assert_eq!(story.phases(), [Drain], "it may come back");
    story.pass(1);
    assert_eq!(story.phases(), [Done]);
    assert_eq!(names(&story), ["pb", "pc", NEW]);
}

#[test]
fn a_successor_that_is_lost_in_the_drain_is_taken_away_and_the_old_one_serves_by_a_new_process() {
    let mut story = begun(&rebuild(&["pa"]));
    story.stays = true;
    story.settle();
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Drain]);
    story.lose("host-x");
    story.settle();
    story.pass(AWAY_MS_MAX - 1);
    assert_eq!(story.phases(), [Drain]);
    story.pass(1);
    assert_eq!(story.phases(), [RolledBack], "{:?}", story.events);
    assert_eq!(names(&story), ["pa", "pb", "pc"]);
    let old = story.placement("pa").clone();
    assert!(!old.advanced("").cold, "the next one hands over");
    assert_eq!((old.leaving, old.generation, old.cold), (None, 1, true));
    assert!(story.process("pa").serves("", 1), "it takes clients again");
    assert!(story.task.message.contains("was lost"));
}

/// In its drain, with clients that stay, and a successor.
fn draining() -> Story {
    let mut story = begun(&rebuild(&["pa"]));
    story.stays = true;
    story.settle();
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Drain]);
    story
}

#[test]
fn errors_are_held_against_a_successor_only_where_those_of_the_old_one_are_known() {
    for is_lost in [true, false] {
        let mut story = before();
        match is_lost {
            true => story.lose("host-a"),
            false => story.heard("pa").commands = COMMANDS_MIN,
        }
        let planned = story.plan(&rebuild(&["pa"])).unwrap();
        story.task.spec = crate::Spec::Proxies(planned.changes);
        story.settle();
        assert_eq!(story.phases(), [Bake]);
        let heard = story.heard(NEW);
        (heard.commands, heard.errors) = (1_000, 30);
        story.settle();
        assert_eq!(story.phases(), [if is_lost { Bake } else { RolledBack }]);
    }
}

#[test]
fn one_that_could_not_open_again_is_tried_again_without_a_hand_over_and_may_be_left() {
    let parked = || {
        let mut story = draining();
        story.lose("host-x");
        story.fails.insert(("pa", ""));
        story.settle();
        story.pass(AWAY_MS_MAX);
        assert_eq!(story.phases(), [Parked], "{:?}", story.events);
        story
    };
    let mut story = parked();
    story.fails.clear();
    story.task = resolved(&story.task, Choice::Retry, story.stage.now_ms);
    story.settle();
    assert_eq!(story.phases(), [RolledBack]);
    let old = story.placement("pa");
    assert_eq!((old.generation, old.cold), (2, true));
    let mut story = parked();
    let was = story.placement("pa").clone();
    story.task = resolved(&story.task, Choice::Finalize, story.stage.now_ms);
    story.settle();
    assert_eq!(story.phases(), [RolledBack]);
    assert_eq!(story.placement("pa"), &was);
    assert!(was.cold && was.leaving.is_none());
}

#[test]
fn a_new_leader_that_hears_the_successor_and_not_its_agent_takes_it_from_nobody() {
    let mut story = draining();
    story.idle.extend(["pa", "pb", "pc", NEW]);
    story.stage.fleet.proxy_processes.clear();
    story.since_ms = story.stage.now_ms;
    story.settle();
    story.pass(SETTLE_MS_MAX + AWAY_MS_MAX);
    assert_eq!(story.phases(), [Drain], "{:?}", story.events);
    // Another process than the one that was watched has to be known to its agent.
    story.heard(NEW).pid += 1;
    story.settle();
    story.pass(AWAY_MS_MAX - 1);
    assert_eq!(story.phases(), [Drain]);
    story.pass(1);
    assert_eq!(story.phases(), [Back]);
}

#[test]
fn a_successor_that_is_lost_is_not_waited_for_when_the_old_one_has_closed_its_clients() {
    for is_lost in [true, false] {
        let mut story = draining();
        story.pass(DRAIN_MS - 10_000);
        match is_lost {
            true => story.lose("host-x"),
            // Its process runs, as its agent says: its clients may be there.
            false => story.heard(NEW).fresh = false,
        }
        story.settle();
        story.pass(10_000 - 1);
        assert_eq!(story.phases(), [Drain]);
        story.pass(1);
        let after = if is_lost { RolledBack } else { Drain };
        assert_eq!(story.phases(), [after], "{:?}", story.events);
        if !is_lost {
            story.heard(NEW).fresh = true;
            story.settle();
            assert_eq!(story.phases(), [Done]);
        }
    }
}

#[test]
fn it_is_prepared_before_the_window_and_clients_are_sent_away_in_it() {
    let options = Options {
        in_window: true,
        ..rebuild(&["pa"])
    };
    let mut story = begun(&options);
    let hour_ms = 3_600_000;
    story.opens_ms = Some(story.stage.now_ms + hour_ms);
    story.task.not_before_ms = story.stage.now_ms + hour_ms;
    story.settle();
    assert_eq!(story.phases(), [Bake]);
    story.pass(hour_ms / 2);
    assert_eq!(story.phases(), [Bake]);
    let message = story.part("pa").message.clone();
    assert!(message.contains("maintenance window"), "{message}");
    // Not well for a moment, long after its bake.
    story.heard(NEW).fresh = false;
    story.settle();
    story.pass(SETTLE_MS_MAX - 1);
    assert_eq!(story.phases(), [Bake]);
    story.heard(NEW).fresh = true;
    story.pass(hour_ms / 2);
    story.opens_ms = None;
    assert_eq!(story.finish(), State::Done);
}

#[test]
fn a_cancel_before_the_drain_takes_the_successor_away_and_later_the_next_are_left_alone() {
    let mut story = begun(&rebuild(&["pa", "pb"]));
    story.settle();
    assert_eq!(story.phases(), [Bake, Ready]);
    story.task.cancel_requested = true;
    story.settle();
    assert_eq!(story.phases(), [RolledBack, RolledBack]);
    assert_eq!(names(&story), ["pa", "pb", "pc"]);
    let mut story = begun(&rebuild(&["pa", "pb"]));
    story.stays = true;
    story.settle();
    story.pass(BAKE_MS);
    assert_eq!(story.phases(), [Drain, Ready]);
    assert!(story.task.is_cancellable(), "for the next one");
    story.task.cancel_requested = true;
    story.stays = false;
    story.pass(TOLD_MS);
    assert_eq!(story.phases(), [Done, RolledBack]);
    assert_eq!(names(&story), ["pb", "pc", NEW]);
}

#[test]
fn a_leader_that_has_just_begun_takes_nobody_away_for_not_having_heard_of_its_clients() {
    let mut story = begun(&rebuild(&["pa"]));
    story.stays = true;
    story.settle();
    story.pass(BAKE_MS);
    story.heard("pa").clients = None;
    story.pass(1_000);
    assert_eq!(story.phases(), [Drain], "it has not reported yet");
    story.lose("host-a");
    story.stage.now_ms += 5 * SILENT_MS_MAX;
    story.since_ms = story.stage.now_ms;
    story.settle();
    story.stage.now_ms += SETTLE_MS_MAX - 1;
    story.settle();
    assert_eq!(story.phases(), [Drain], "nor could it");
    story.pass(1);
    assert_eq!(story.phases(), [Done]);
}

#[test]
fn what_an_older_leader_dropped_is_written_again() {
    let mut story = begun(&rebuild(&["pa"]));
    story.stays = true;
    story.settle();
    story.pass(BAKE_MS);
    for one in &mut story.instance.proxies {
        one.leaving = None;
    }
    story.settle();
    assert!(story.placement("pa").leaving.is_some());
    assert_eq!(story.phases(), [Drain]);
}

#[test]
fn an_older_leader_reads_a_proxy_that_waits_for_an_operator() {
    use slotmesh_proto::store::v1 as store;
    let story = begun(&rebuild(&["pa"]));
    let record = crate::wire::task_to(&story.task, 1);
    let Some(store::task_record::Spec::Proxies(spec)) = record.spec else {
        panic!("{record:?}")
    };
    assert_eq!(spec.proxies[0].phase(), store::ProxyPhase::Parked);
    assert_eq!(spec.proxies[0].rebuild_phase(), store::ProxyPhase::Ready);
}

#[test]
fn it_waits_for_a_host_and_is_skipped_without_one() {
    let mut story = begun(&rebuild(&["pa"]));
    for host in ["host-x", "host-y"] {
        story.stage.fleet.hosts.remove(&host.into());
    }
    story.settle();
    assert_eq!(story.phases(), [Check]);
    story.pass(UNFIT_MS_MAX);
    assert_eq!(story.phases(), [Skipped]);
    assert_eq!(story.task.state, State::RolledBack);
    assert_eq!(menu(&story.task), [] as [Choice; 0]);
    assert_ne!(story.phases(), [Back]);
}

#[test]
fn what_can_not_be_meant_is_refused_with_the_reason() {
    let story = before();
    let to = |host: &str, proxies: &[&str]| Options {
        rebuild: Some(Rebuild {
            host: Some(host.into()),
            drain_ms: 0,
        }),
        ..rebuild(proxies)
    };
    let long = Options {
        rebuild: Some(Rebuild {
            host: None,
            drain_ms: DRAIN_MS_MAX + 1,
        }),
        ..rebuild(&["pa"])
    };
    for (options, reason) in [
        (to("host-a", &["pa"]), "HOST_IS_ITS_OWN"),
        (to("host-b", &["pa"]), "HOST_HAS_PROXY"),
        (to("host-z", &["pa"]), "HOST_NOT_LIVE"),
        (to("host-x", &["pa", "pb"]), "HOST_FOR_ONE"),
        (rebuild(&[]), "PROXIES_MISSING"),
        (rebuild(&["pa", "pa"]), "PROXY_TWICE"),
        (long, "DRAIN_INVALID"),
    ] {
        assert_eq!(story.plan(&options).unwrap_err().reason, reason);
    }
    let planned = story.plan(&to("host-y", &["pa"])).unwrap();
    assert_eq!(planned.to_hosts, ["host-y".into()]);
    let few = Story::before();
    let refused = few.plan(&rebuild(&["pa"])).unwrap_err();
    assert_eq!(refused.reason, "NO_OTHER_HOST");
}

#[test]
fn the_host_is_one_of_the_old_ones_zone_with_the_fewest_processes() {
    let mut story = before();
    story.stage.fleet.zones = [("host-a", "z1"), ("host-x", "z2"), ("host-y", "z1")]
        .map(|(host, zone)| (host.into(), zone.to_owned()))
        .into();
    let planned = story.plan(&rebuild(&["pa"])).unwrap();
    assert_eq!(planned.to_hosts, ["host-y".into()]);
}
