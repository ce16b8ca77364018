-- Health of Attune's four kinds for Argo CD; the same script serves them all. The answers agree with kstatus and with
-- `kubectl wait --for=condition=Ready` (Dataset, Canary) or `=Succeeded` (FineTune, Evaluation).
local terminal = {Dataset = "Ready", FineTune = "Succeeded", Evaluation = "Succeeded", Canary = "Ready"}

local function find_condition(conditions, kind)
  if type(conditions) == "table" then
    for _, condition in ipairs(conditions) do
      if condition.type == kind then
        return condition
      end
    end
  end
  return {}
end

local function describe(condition, otherwise)
  local reason, message = condition.reason or "", condition.message or ""
  if reason ~= "" and message ~= "" then
    return reason .. ": " .. message
  end
  return reason .. message ~= "" and reason .. message or otherwise
end

local metadata = obj.metadata or {}
local spec = obj.spec or {}
local status = obj.status or {}

-- What the operator said of an earlier spec is no news of this one.
if status.observedGeneration == nil or status.observedGeneration ~= metadata.generation then
  return {status = "Progressing", message = "Waiting for the operator to look at this generation"}
end

local stalled = find_condition(status.conditions, "Stalled")
if stalled.status == "True" then
  return {status = "Degraded", message = describe(stalled, "Stalled")}
end

local kind = terminal[obj.kind] or "Ready"
local done = find_condition(status.conditions, kind)
if spec.suspend == true and done.status ~= "True" then
  return {status = "Suspended", message = describe(done, "spec.suspend is true")}
end

local reconciling = find_condition(status.conditions, "Reconciling")
if reconciling.status == "True" then
  return {status = "Progressing", message = describe(reconciling, "Reconciling")}
end
if done.status == "True" then
  return {status = "Healthy", message = describe(done, kind)}
end
return {status = "Progressing", message = describe(done, "Not " .. kind .. " yet")}
