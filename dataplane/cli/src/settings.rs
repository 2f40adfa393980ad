//! Environment variables become flags, so that clap knows one kind of setting, and all problems are told at once.

use std::{
    collections::BTreeMap,
    ffi::{OsStr, OsString},
    fmt::Write,
};

use clap::{
    Arg, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

/// The command line of a process with these arguments and this environment: every variable that belongs to a flag of
/// the chosen role, and was not given as a flag, is put in.
///
/// # Errors
/// All settings that are wrong, one line each. Values of secrets are not in it.
pub fn arguments(
    command: &Command,
    args: impl IntoIterator<Item = OsString>,
    variables: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Vec<OsString>, String> {
    let args: Vec<OsString> = args.into_iter().collect();
    let variables: BTreeMap<OsString, OsString> = variables.into_iter().collect();
    let role = args
        .iter()
        .skip(1)
        .find_map(|arg| command.find_subcommand(arg));
    let Some(role) = role else { return Ok(args) };

    let mut problems = Problems::default();
    let mut from_environment = BTreeMap::new();
    for flag in role
        .get_arguments()
        .filter_map(Arg::get_long)
        .filter(|flag| !is_no_setting(flag))
    {
        if args.iter().any(|arg| names_flag(arg, flag)) {
            continue;
        }
        match value_of(&variables, flag, is_secret(flag)) {
            Ok(Some(value)) => drop(from_environment.insert(flag.to_owned(), value)),
            Ok(None) => {}
            Err(problem) => problems.add(variable(flag), problem),
        }
    }
    // clap stops at the first problem: take that flag out, note it, and ask again.
    loop {
        let line = joined(&args, &from_environment);
        let Err(error) = command.clone().try_get_matches_from(&line) else {
            return if problems.is_empty() {
                Ok(line)
            } else {
                Err(problems.text())
            };
        };
        let flag = invalid_flag(&error).filter(|flag| from_environment.contains_key(flag));
        let Some(flag) = flag else {
            // About the command line itself (help and version are "errors" too): clap says it better.
            return if problems.is_empty() {
                Ok(line)
            } else {
                Err(problems.text())
            };
        };
        problems.add(
            variable(&flag),
            why(&error, &from_environment[&flag], is_secret(&flag)),
        );
        from_environment.remove(&flag);
    }
}

/// The variable of a flag: `postgres-host` is `POSTGRES_HOST`.
pub fn variable(flag: &str) -> String {
    flag.to_uppercase().replace('-', "_")
}

/// Whether a flag's value must not be shown, and may come from a file.
pub fn is_secret(flag: &str) -> bool {
    flag.ends_with("-password") || flag == "postgres-url" || flag == "redis-url"
}

/// Flags that are no variables: clap's own, and what is done once.
pub fn is_no_setting(flag: &str) -> bool {
    matches!(flag, "help" | "version" | "reshard")
}

fn names_flag(arg: &OsStr, flag: &str) -> bool {
    arg.to_str()
        .and_then(|arg| arg.strip_prefix("--"))
        .is_some_and(|arg| arg.split('=').next() == Some(flag))
}

fn value_of(
    variables: &BTreeMap<OsString, OsString>,
    flag: &str,
    secret: bool,
) -> Result<Option<String>, String> {
    let name = variable(flag);
    let set = |name: &str| {
        variables
            .get(OsStr::new(name))
            .filter(|value| !value.is_empty())
    };
    let text = |value: &OsString| {
        value
            .to_str()
            .map(str::to_owned)
            .ok_or_else(|| "is not UTF-8".to_owned())
    };
    match (set(&name), set(&format!("{name}_FILE"))) {
        (Some(_), Some(_)) if secret => Err(format!(
            "is set, and {name}_FILE too; only one of them can count"
        )),
        (None, Some(file)) if secret => match std::fs::read_to_string(file) {
            // Editors and `echo` end files with a newline that is not part of the secret.
            Ok(content) => Ok(Some(content.trim_end_matches(['\r', '\n']).to_owned())),
            Err(error) => Err(format!(
                "_FILE names {}, which cannot be read: {error}",
                file.display()
            )),
        },
        (Some(value), _) => text(value).map(Some),
        (None, _) => Ok(None),
    }
}

fn joined(args: &[OsString], from_environment: &BTreeMap<String, String>) -> Vec<OsString> {
    let flags = from_environment
        .iter()
        .map(|(flag, value)| OsString::from(format!("--{flag}={value}")));
    args.iter().cloned().chain(flags).collect()
}

fn invalid_flag(error: &clap::Error) -> Option<String> {
    match error.get(ContextKind::InvalidArg)? {
        // `--postgres-port <POSTGRES_PORT>`
        ContextValue::String(arg) => Some(
            arg.split_whitespace()
                .next()?
                .strip_prefix("--")?
                .to_owned(),
        ),
        _ => None,
    }
}

fn why(error: &clap::Error, value: &str, secret: bool) -> String {
    let mut text = if secret {
        "is not valid".to_owned()
    } else {
        format!("cannot be `{value}`")
    };
    if let (ErrorKind::InvalidValue, Some(ContextValue::Strings(valid))) =
        (error.kind(), error.get(ContextKind::ValidValue))
    {
        let _ = write!(text, ": one of {} is expected", valid.join(", "));
    } else if let Some(source) = std::error::Error::source(error) {
        let _ = write!(text, ": {source}");
    }
    text
}

/// Wrong settings, in the order of their names.
#[derive(Default)]
struct Problems(BTreeMap<String, String>);

impl Problems {
    fn add(&mut self, variable: String, problem: String) {
        self.0.insert(variable, problem);
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn text(&self) -> String {
        let mut text = format!(
            "{} settings are wrong; docs/CONFIGURATION.md describes them:",
            self.0.len()
        );
        for (variable, problem) in &self.0 {
            let _ = write!(text, "\n  {variable} {problem}");
        }
        text
    }
}

/// Every flag of `command` takes a value or is clap's own: what [`joined`] relies on.
#[cfg(test)]
fn takes_a_value(arg: &Arg) -> bool {
    matches!(
        arg.get_action(),
        clap::ArgAction::Set | clap::ArgAction::Append
    )
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::*;
    use crate::cli::{Cli, Role};

    fn line(args: &[&str], variables: &[(&str, &str)]) -> Result<Vec<OsString>, String> {
        arguments(
            &Cli::command(),
            args.iter().map(OsString::from),
            variables
                .iter()
                .map(|(name, value)| (name.into(), value.into())),
        )
    }

    fn setup_role(args: &[&str], variables: &[(&str, &str)]) -> crate::cli::SetupRole {
        match Cli::parse_from(line(args, variables).expect("valid")).role {
            Role::Setup(role) => role,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn variables_count_and_flags_win() {
        let role = setup_role(
            &["birb-nest", "setup", "--redis-port=7000"],
            &[
                ("POSTGRES_PORT", "6000"),
                ("REDIS_PORT", "6001"),
                ("NATS_SHARDS", "4"),
                ("UNRELATED", "x"),
                ("REDIS_HOST", ""),
            ],
        );
        assert_eq!(role.servers.postgres.postgres_port, 6000);
        assert_eq!(role.servers.redis.redis_port, 7000);
        assert_eq!(role.servers.redis.redis_host, "localhost", "empty is unset");
        assert_eq!(role.servers.log.nats_shards.get(), 4);
    }

    #[test]
    fn all_problems_are_told_at_once_and_no_secret() {
        let problems = line(
            &["birb-nest", "api"],
            &[
                ("POSTGRES_PORT", "many"),
                ("POSTGRES_SSLMODE", "maybe"),
                ("REDIS_TIMEOUT", "0s"),
                ("NATS_SHARDS", "65"),
                ("API_MAX_VALUE_BYTES", "1MB"),
                ("LOG_LEVEL", "loud"),
                ("REDIS_PASSWORD", "hunter2"),
                ("REDIS_PASSWORD_FILE", "/run/secrets/redis"),
                ("POSTGRES_PASSWORD_FILE", "/nonexistent/secret"),
            ],
        )
        .expect_err("all wrong");
        for name in [
            "POSTGRES_PORT cannot be `many`",
            "POSTGRES_SSLMODE cannot be `maybe`: one of disable, prefer",
            "REDIS_TIMEOUT cannot be `0s`",
            "NATS_SHARDS cannot be `65`",
            "API_MAX_VALUE_BYTES cannot be `1MB`",
            "LOG_LEVEL cannot be",
            "REDIS_PASSWORD is set, and REDIS_PASSWORD_FILE too",
            "POSTGRES_PASSWORD _FILE names /nonexistent/secret",
        ] {
            assert!(problems.contains(name), "{name} is not in:\n{problems}");
        }
        assert!(problems.starts_with("8 settings are wrong"));
        assert!(!problems.contains("hunter2"));
    }

    #[test]
    fn a_secret_comes_from_its_file() {
        let file = std::env::temp_dir().join(format!("birb-nest-secret-{}", std::process::id()));
        std::fs::write(&file, "s3cret\n").expect("written");
        let role = setup_role(
            &["birb-nest", "setup"],
            &[("POSTGRES_PASSWORD_FILE", file.to_str().expect("UTF-8"))],
        );
        std::fs::remove_file(&file).expect("removed");
        assert_eq!(
            role.servers
                .postgres
                .postgres_password
                .expect("set")
                .expose(),
            "s3cret"
        );
        assert!(!format!("{:?}", role.servers.redis).contains("s3cret"));
    }

    #[test]
    fn every_setting_takes_a_value() {
        for role in Cli::command().get_subcommands() {
            for arg in role
                .get_arguments()
                .filter(|arg| !arg.get_long().is_some_and(is_no_setting))
            {
                assert!(takes_a_value(arg), "{:?}", arg.get_id());
            }
        }
    }

    #[test]
    fn the_command_line_s_own_mistakes_are_left_to_clap() {
        assert!(line(&["birb-nest"], &[("POSTGRES_PORT", "many")]).is_ok());
        assert!(line(&["birb-nest", "api", "--nonsense"], &[]).is_ok());
    }
}
