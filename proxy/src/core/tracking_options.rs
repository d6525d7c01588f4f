//! CLIENT TRACKING's options, and which of them fit together.
//!
//! Invariant: the checks, their order and their texts are Redis 7.0's.

use std::collections::BTreeSet;

use slotmesh_resp::{Protocol, parse_i64, write};

/// Which reads are remembered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    All,
    /// Those behind CLIENT CACHING YES.
    OptIn,
    /// All but those behind CLIENT CACHING NO.
    OptOut,
    /// None: every change of keys with certain prefixes is told.
    Broadcast,
}

/// What a client has asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) mode: Mode,
    /// Id of the client that is told; 0: itself.
    pub(super) redirect: u64,
    pub(super) no_loop: bool,
    pub(super) prefixes: BTreeSet<Vec<u8>>,
}

/// What CLIENT TRACKING says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    On(Options),
    Off,
}

fn syntax() -> String {
    "ERR syntax error".to_owned()
}

/// Reads the arguments behind `CLIENT TRACKING`. `exists` tells whether a client has this id, and
/// `now` is what the client has so far.
pub(super) fn read(
    words: &[&[u8]],
    now: Option<&Options>,
    exists: impl Fn(u64) -> bool,
) -> Result<Asked, String> {
    let (mut options, mut given) = (Options::default(), Vec::new());
    let (mut broadcast, mut opt_in, mut opt_out) = (false, false, false);
    let mut at = 1;
    while let Some(word) = words.get(at) {
        let is = |name: &str| word.eq_ignore_ascii_case(name.as_bytes());
        let value = words.get(at + 1);
        at += 1;
        match value {
            Some(value) if is("redirect") => {
                at += 1;
                options.redirect = redirect(options.redirect, value, &exists)?;
            }
            Some(value) if is("prefix") => {
                at += 1;
                given.push(value.to_vec());
            }
            _ if is("bcast") => broadcast = true,
            _ if is("optin") => opt_in = true,
            _ if is("optout") => opt_out = true,
            _ if is("noloop") => options.no_loop = true,
            _ => return Err(syntax()),
        }
    }
    let switch = words.first().copied().unwrap_or_default();
    if switch.eq_ignore_ascii_case(b"off") {
        return Ok(Asked::Off);
    }
    if !switch.eq_ignore_ascii_case(b"on") {
        return Err(syntax());
    }
    if !broadcast && !given.is_empty() {
        return Err("ERR PREFIX option requires BCAST mode to be enabled".to_owned());
    }
    let mode = now.map(|now| now.mode);
    if mode.is_some_and(|mode| (mode == Mode::Broadcast) != broadcast) {
        let text = "ERR You can't switch BCAST mode on/off before disabling tracking for this \
             client, and then re-enabling it with a different mode.";
        return Err(text.to_owned());
    }
    if broadcast && (opt_in || opt_out) {
        return Err("ERR OPTIN and OPTOUT are not compatible with BCAST".to_owned());
    }
    if opt_in && opt_out {
        return Err("ERR You can't specify both OPTIN mode and OPTOUT mode".to_owned());
    }
    if (opt_in && mode == Some(Mode::OptOut)) || (opt_out && mode == Some(Mode::OptIn)) {
        let text = "ERR You can't switch OPTIN/OPTOUT mode before disabling tracking for this \
             client, and then re-enabling it with a different mode.";
        return Err(text.to_owned());
    }
    options.mode = match (broadcast, opt_in, opt_out) {
        (true, ..) => Mode::Broadcast,
        (_, true, _) => Mode::OptIn,
        (_, _, true) => Mode::OptOut,
        _ => Mode::All,
    };
    if broadcast {
        options.prefixes = now.map(|now| now.prefixes.clone()).unwrap_or_default();
        check_prefixes(&options.prefixes, &given)?;
        if given.is_empty() {
            given.push(Vec::new());
        }
        options.prefixes.extend(given);
    }
    Ok(Asked::On(options))
}

fn redirect(before: u64, value: &[u8], exists: impl Fn(u64) -> bool) -> Result<u64, String> {
    if before != 0 {
        return Err("ERR A client can only redirect to a single other client".to_owned());
    }
    let id = parse_i64(value).ok_or("ERR value is not an integer or out of range")?;
    u64::try_from(id)
        .ok()
        .filter(|id| exists(*id))
        .ok_or_else(|| "ERR The client ID you want redirect to does not exist".to_owned())
}

fn check_prefixes(before: &BTreeSet<Vec<u8>>, given: &[Vec<u8>]) -> Result<(), String> {
    let overlap = |a: &[u8], b: &[u8]| a.starts_with(b) || b.starts_with(a);
    let text = |new: &[u8], what: &str, old: &[u8]| {
        let (new, old) = (String::from_utf8_lossy(new), String::from_utf8_lossy(old));
        format!(
            "ERR Prefix '{new}' overlaps with {what} prefix '{old}'. Prefixes for a single client \
             must not overlap."
        )
    };
    for (at, new) in given.iter().enumerate() {
        if let Some(old) = before.iter().find(|old| overlap(new, old)) {
            return Err(text(new, "an existing", old));
        }
        if let Some(old) = given[at + 1..].iter().find(|old| overlap(new, old)) {
            return Err(text(new, "another provided", old));
        }
    }
    Ok(())
}

/// CLIENT TRACKINGINFO. `caching`: CLIENT CACHING was called; `broken`: the client that was to be
/// told is gone.
pub(super) fn write_info(
    out: &mut Vec<u8>,
    protocol: Protocol,
    options: Option<&Options>,
    caching: bool,
    broken: bool,
) {
    let mut flags = vec![if options.is_some() { "on" } else { "off" }];
    let mode = options.map(|options| options.mode);
    match mode {
        Some(Mode::Broadcast) => flags.push("bcast"),
        Some(Mode::OptIn) => flags.push("optin"),
        Some(Mode::OptOut) => flags.push("optout"),
        _ => {}
    }
    match mode {
        Some(Mode::OptIn) if caching => flags.push("caching-yes"),
        Some(Mode::OptOut) if caching => flags.push("caching-no"),
        _ => {}
    }
    if options.is_some_and(|options| options.no_loop) {
        flags.push("noloop");
    }
    if broken {
        flags.push("broken_redirect");
    }
    write::write_map_header(out, protocol, 3);
    write::write_bulk(out, b"flags");
    write::write_set_header(out, protocol, flags.len());
    flags
        .iter()
        .for_each(|flag| write::write_bulk(out, flag.as_bytes()));
    write::write_bulk(out, b"redirect");
    write::write_int(out, options.map_or(-1, |options| options.redirect as i64));
    write::write_bulk(out, b"prefixes");
    let prefixes = options.map(|options| &options.prefixes);
    write::write_array_header(out, prefixes.map_or(0, BTreeSet::len));
    prefixes
        .into_iter()
        .flatten()
        .for_each(|prefix| write::write_bulk(out, prefix));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(words: &str, now: Option<&Options>, want: Result<Mode, &str>) {
        let list: Vec<&[u8]> = words.split(' ').map(str::as_bytes).collect();
        let got = read(&list, now, |id| id == 3);
        let got = got
            .as_ref()
            .map_err(String::as_str)
            .map(|asked| match asked {
                Asked::On(options) => options.mode,
                Asked::Off => Mode::All,
            });
        match (got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{words}"),
            (Err(got), Err(want)) => assert!(got.contains(want), "{words}: {got}"),
            _ => panic!("{words}: {got:?}"),
        }
    }

    #[test]
    fn options_fit_together_as_redis_says() {
        check("on", None, Ok(Mode::All));
        check("ON bcast prefix a PREFIX b", None, Ok(Mode::Broadcast));
        check("off bcast", None, Ok(Mode::All));
        check("maybe", None, Err("syntax"));
        check("on redirect", None, Err("syntax"));
        check("on redirect 3", None, Ok(Mode::All));
        check("on redirect 4", None, Err("does not exist"));
        check("on redirect 3 redirect 3", None, Err("single other"));
        check("on prefix a", None, Err("requires BCAST"));
        check("on bcast optin", None, Err("not compatible"));
        check("on optin optout", None, Err("both OPTIN"));
        check(
            "on bcast prefix ab prefix abc",
            None,
            Err("'ab' overlaps with another provided prefix 'abc'"),
        );
        let all = Options {
            mode: Mode::Broadcast,
            prefixes: [b"foo".to_vec()].into(),
            ..Options::default()
        };
        check(
            "on bcast prefix fooo",
            Some(&all),
            Err("'fooo' overlaps with an existing prefix 'foo'"),
        );
        check("on bcast prefix bar", Some(&all), Ok(Mode::Broadcast));
        check("on", Some(&all), Err("switch BCAST"));
        let opt_in = Options {
            mode: Mode::OptIn,
            ..Options::default()
        };
        check("on optout", Some(&opt_in), Err("switch OPTIN"));
    }
}
