//! Reads the config file, and says what is wrong with one: line, key, value, limit, and the fix.

use serde_saphyr::Error as YamlError;

use super::Settings;

/// Reads YAML, and lists the keys that are there and change nothing, in the order of the file; else what is wrong with it,
/// and the fix. Values are not checked.
pub(super) fn from_yaml(text: &str) -> Result<(Settings, Vec<String>), (String, String)> {
    let options = serde_saphyr::options! {
        // Text that looks like a number or a switch must be quoted: `prompts: [1984]` is rather a mistake.
        no_schema: true,
        strict_booleans: true,
        with_snippet: false,
        // The file is the user's own, and a list of prompts may be long.
        budget: None,
    };
    let (mut path, mut ignored) = (String::new(), Vec::new());
    let settings = serde_saphyr::with_deserializer_from_str_with_options(text, options, |yaml| {
        // What is optional, as the whole file is, is `?` in these paths.
        let mut skipped = |path: serde_ignored::Path<'_>| {
            ignored.push(path.to_string().split('.').filter(|&name| name != "?").collect::<Vec<_>>().join("."));
        };
        let yaml = serde_ignored::Deserializer::new(yaml, &mut skipped);
        serde_path_to_error::deserialize::<_, Option<Settings>>(yaml).map_err(|error| {
            path = error.path().to_string();
            error.into_inner()
        })
    });
    let no_keys = || ("it holds no keys".to_owned(), "write it as `key: value` lines".to_owned());
    match settings {
        Ok(settings) => settings.map(|settings| (settings, ignored)).ok_or_else(no_keys),
        Err(YamlError::Unexpected { .. }) if path == "." => Err(no_keys()),
        Err(error) => {
            let (problem, fix) = explain(text, &path, &error);
            let line = error.location().map_or(String::new(), |location| format!("line {}: ", location.line()));
            Err((format!("{line}{problem}"), fix))
        }
    }
}

/// What is wrong at `path`, and the fix.
fn explain(text: &str, path: &str, error: &YamlError) -> (String, String) {
    let value = error.location().and_then(|location| {
        let start = usize::try_from(location.span().byte_offset()?).ok()?;
        let length = usize::try_from(location.span().byte_len()?).ok()?;
        // Of a list or a section the parser marks the beginning only; of nothing, the colon before it.
        let rest = text.get(start..)?.lines().next().unwrap_or_default();
        let length = if length == 0 || rest.starts_with(['[', '{']) { rest.len() } else { length };
        let value = text.get(start..start + length)?.trim_start_matches(':').trim();
        (!value.is_empty()).then_some(value)
    });
    let (value, path) = (value.unwrap_or("null"), &path.replace('?', "(key)"));
    let limit = |limit: &str, fix: &str| (format!("{path} = {value} {limit}"), fix.to_owned());
    match error {
        YamlError::SerdeUnknownField { field, expected, .. } => {
            (format!("{path} is not a known key"), did_you_mean(path, field, expected))
        }
        YamlError::DuplicateMappingKey { key: Some(key), .. } => {
            (format!("{key} is there twice"), "keep one of the two".to_owned())
        }
        YamlError::QuotingRequired { .. } | YamlError::NullIntoString { .. } => {
            limit("is not text", "put it in quotes")
        }
        YamlError::InvalidScalar { ty: "floating point", .. } => limit("is not a number", "repair it"),
        YamlError::InvalidScalar { ty, .. } if ty.starts_with('u') => {
            limit("is not a whole number of at least 0 and below 2^64", "repair it")
        }
        YamlError::InvalidBooleanStrict { .. } => limit("is not true or false", "write one of them"),
        YamlError::Unexpected { expected: "mapping start", .. } => {
            limit("is not a section of keys", "write its keys indented below it")
        }
        YamlError::Unexpected { expected: "string scalar", .. }
        | YamlError::ExternallyTaggedEnumExpectedScalarOrMapping { .. } => {
            limit("is not a single value", "write one value, in quotes if it is text with `: ` in it")
        }
        YamlError::SerdeUnknownVariant { expected, .. } => {
            limit(&format!("is not one of {}", expected.join(", ")), "choose one of them")
        }
        YamlError::SerdeInvalidType { unexpected, expected, .. } => {
            (format!("{path} is {unexpected}, not {expected}"), "put text in quotes".to_owned())
        }
        // A conversion of our own: its message is the limit.
        YamlError::Message { msg, .. } if path != "." => limit(msg, "repair it"),
        other if path == "." => (other.to_string(), "repair the YAML".to_owned()),
        other => (format!("{path}: {other}"), "repair the YAML".to_owned()),
    }
}

/// The known key that is most like the unknown key at `path`: of its own section, or where that has none like it, of
/// another one.
fn did_you_mean(path: &str, unknown: &str, siblings: &[&str]) -> String {
    let section = path.strip_suffix(unknown).unwrap_or_default();
    let known: Vec<String> = Settings::default().entries().into_iter().map(|(key, _)| key).collect();
    let nearest = |keys: &mut dyn Iterator<Item = String>| {
        let likeness =
            |key: &str| strsim::normalized_damerau_levenshtein(unknown, key.rsplit('.').next().unwrap_or(key));
        let nearest = keys.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        nearest.filter(|nearest| likeness(nearest) >= 0.5)
    };
    if let Some(sibling) = nearest(&mut siblings.iter().map(|key| format!("{section}{key}"))) {
        return format!("did you mean {sibling}?");
    }
    if let Some(elsewhere) = nearest(&mut known.iter().cloned()) {
        return format!("did you mean {elsewhere}, of another section?");
    }
    let first = |key: &str| key.split('.').next().unwrap_or_default().to_owned();
    let mut here: Vec<_> = known.iter().filter_map(|key| key.strip_prefix(section)).map(first).collect();
    here.dedup();
    format!("known here are {section}{}", here.join(&format!(", {section}")))
}
